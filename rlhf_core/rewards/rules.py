"""Applies all rules of a configuration to a batch of replies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_core.errors import DataError
from rlhf_core.jobs.reward_services import SERVICES
from rlhf_core.jobs.rewards import (
    AnswerReward,
    EnvironmentReward,
    ForbiddenWordsReward,
    LanguageReward,
    LengthPenaltyReward,
    LengthReward,
    ModelReward,
    MustEndReward,
    PythonReward,
    ReasoningGymReward,
    RegexReward,
    RepetitionReward,
    Reward,
    SentimentReward,
    reward_names,
)
from rlhf_core.rewards.answer import Verdict, exact_match, numeric_match
from rlhf_core.rewards.forbidden import forbidden_score
from rlhf_core.rewards.function import user_function
from rlhf_core.rewards.length import length_penalty, length_score, text_length
from rlhf_core.rewards.patterns import compile_pattern, extract, matches
from rlhf_core.rewards.reasoning import reasoning_score
from rlhf_core.rewards.references import expected, is_missing
from rlhf_core.rewards.repetition import repetition_score
from rlhf_core.rewards.sentiment import sentiment_score
from rlhf_core.rewards.text import script_share


@dataclass(frozen=True)
class Batch:
    """The arguments of a rule: N samples; see `Rules.score`."""

    prompts: list[list[dict[str, str]]]
    replies: list[str]
    rows: list[dict[str, Any]]
    finished: list[bool]
    tokens: list[int] | None


Scorer = Callable[[Batch], list[float]]


class Rules:
    """The items of the setting `rewards` except the reward model, the environment and services
    (`Services`).

    Args:
        rewards: in the order of the configuration.
        seed: for reasoning-gym's task objects, the only rules with randomness.

    Attributes:
        names: one per rule, for metrics: its type, with -2, -3 for further rules of the type.
        weights: one per rule; `score` does not apply them.
        failures: name -> number of replies that got a rule's lowest score because the rule failed:
            regex_timeout, verifier_timeout, verifier_error, answer_unreadable. Counted since the
            start.

    Raises:
        ConfigError: a package or function that a rule needs is missing.
    """

    def __init__(self, rewards: Sequence[Reward], seed: int) -> None:
        others = (ModelReward, EnvironmentReward, *SERVICES)
        rules = [reward for reward in rewards if not isinstance(reward, others)]
        self.names = reward_names(rules)
        self.weights = [rule.weight for rule in rules]
        self.failures: Counter[str] = Counter()
        self._scorers = [_scorer(rule, seed, self.failures) for rule in rules]

    def score(
        self,
        prompts: list[list[dict[str, str]]],
        replies: list[str],
        rows: list[dict[str, Any]],
        finished: list[bool],
        tokens: list[int] | None = None,
    ) -> list[list[float]]:
        """The scores: one list per rule, with one finite number per sample.

        Args:
            prompts: messages {"role", "content"} of N samples.
            replies: N texts without special tokens.
            rows: N rows of the prompts data set; `answer` and `extra` may be missing or empty.
            finished: whether each reply ended with its end-of-turn token.
            tokens: of each reply; may be None where no rule counts them.

        Raises:
            DataError: a row lacks what a rule needs.
            TrainingFailure: a user's function failed, took too long, or did not return one finite
                number per sample.
        """
        count = len(replies)
        assert len(prompts) == len(rows) == len(finished) == count
        if not replies:  # of a rank without a share, for which no function is called
            return [[] for _ in self._scorers]
        batch = Batch(prompts, replies, rows, finished, tokens)
        scores = [scorer(batch) for scorer in self._scorers]
        assert all(len(of_rule) == count for of_rule in scores)
        return scores


def _scorer(rule: Reward, seed: int, failures: Counter[str]) -> Scorer:
    match rule:
        case LengthReward():
            return _each(lambda text: length_score(text, rule.target, rule.width, rule.unit))
        case LengthPenaltyReward():
            return lambda batch: _length_penalty(rule, batch)
        case RegexReward():
            pattern = compile_pattern(rule.pattern, rule.ignore_case)
            return _each(lambda text: float(matches(pattern, text, rule.mode, failures)))
        case MustEndReward():
            return lambda batch: _must_end(rule, batch)
        case ForbiddenWordsReward():
            return _each(forbidden_score(rule.words))
        case RepetitionReward():
            return _each(lambda text: repetition_score(text, rule.n))
        case LanguageReward():
            return _each(lambda text: script_share(text, rule.language))
        case AnswerReward():
            return _answers(rule, failures)
        case SentimentReward():
            return _each(sentiment_score())
        case ReasoningGymReward():
            verify = reasoning_score(rule, seed, failures)
            return lambda batch: verify(batch.replies, batch.rows)
        case PythonReward():
            call = user_function(rule)
            return lambda batch: call(
                prompts=batch.prompts, replies=batch.replies, rows=batch.rows,
                finished=batch.finished,
            )  # fmt: skip
    raise AssertionError(rule)


def _each(score: Callable[[str], float]) -> Scorer:
    return lambda batch: [score(reply) for reply in batch.replies]


def _length_penalty(rule: LengthPenaltyReward, batch: Batch) -> list[float]:
    if rule.unit == "tokens":
        assert batch.tokens is not None
        lengths = batch.tokens
    else:
        lengths = [text_length(reply, rule.unit) for reply in batch.replies]
    return [length_penalty(length, rule.start, rule.end) for length in lengths]


def _must_end(rule: MustEndReward, batch: Batch) -> list[float]:
    return [
        float(
            (finished or not rule.end_of_turn)
            and (not rule.endings or reply.rstrip().endswith(rule.endings))
        )
        for reply, finished in zip(batch.replies, batch.finished, strict=True)
    ]


def _answers(rule: AnswerReward, failures: Counter[str]) -> Scorer:
    pattern = compile_pattern(rule.pattern) if rule.pattern is not None else None

    def one(reply: str, row: dict[str, Any]) -> float:
        answer = expected(pattern, row.get("answer") or "", failures)
        missing = is_missing(rule, answer)
        if missing and rule.without_answer is None:
            raise DataError(_no_answer(rule, row))
        if missing:
            return float(rule.without_answer or 0.0)
        given = reply if pattern is None else extract(pattern, reply, failures)
        if given is None:
            return 0.0
        if rule.match == "numeric":
            verdict = numeric_match(given, answer, rule.tolerance)
            if verdict is Verdict.UNREADABLE:
                failures["answer_unreadable"] += 1
            return float(verdict is Verdict.EQUAL)
        return float(exact_match(given, answer))

    return lambda batch: [one(*pair) for pair in zip(batch.replies, batch.rows, strict=True)]


def _no_answer(rule: AnswerReward, row: dict[str, Any]) -> str:
    found = str(row.get("answer") or "")
    needed = "a number" if rule.match == "numeric" else "a text"
    return (
        f"The reward answer needs {needed} in column 'answer' of each prompt; row "
        f"{row.get('row', '?')} has {found[:60]!r}. Fill it in, name the column that has it "
        "(data.prompts.columns: {answer: ...}), or set the reward's without_answer."
    )
