"""The replies of one model as texts, with what judges, rules and lists say of each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_core.data.rows.conversation import conversation
from rlhf_core.evaluation.behaviour import changes_language, refuses
from rlhf_core.evaluation.measure import Measured
from rlhf_core.evaluation.rule_rewards import RuleRewards
from rlhf_core.jobs import EvaluateJob
from rlhf_core.judges.lexicon import get_judge

Columns = Mapping[str, Sequence[float]]
"""Name of a number -> its value for each reply."""


@dataclass(frozen=True)
class Scored:
    """A model's replies to the held-out prompts, or to the first of them.

    Attributes:
        columns: reward, disagreement, answers, gold, kl, length, surprise (-log p, nats), finished,
            language_changes, refusals; without those that were not measured.
    """

    measured: Measured
    texts: list[str]
    columns: Columns


class Scorer:
    """Scores replies one model after another, on one rank.

    Args:
        rows: held-out prompts. tokenizer: of the models. log: takes a sentence for people.

    Attributes:
        prompts: the prompts as texts.
    """

    def __init__(
        self,
        job: EvaluateJob,
        rows: Sequence[dict[str, Any]],
        tokenizer: Any,
        log: Callable[[str], None],
    ) -> None:
        self.rows, self.tokenizer = rows, tokenizer
        self.prompts = [shown_prompt(row["prompt"]) for row in rows]
        self.judge = None if job.judge == "none" else get_judge(job.judge)
        self.rules = RuleRewards(job.rewards, job.seed, log) if job.rewards else None

    def __call__(self, measured: Measured) -> Scored:
        replies = measured.replies
        texts = [reply.text(self.tokenizer) for reply in replies]
        pairs = list(zip(self.prompts, texts, strict=False))  # greedy: to the first prompts only
        rewards = {"reward": measured.rewards, "disagreement": measured.disagreement}
        if self.rules is not None:
            rows = self.rows[: len(texts)]
            # with the space around them, as in training
            whole = [self.tokenizer.decode(r.ids, skip_special_tokens=True) for r in replies]
            rewards |= self.rules.score(rows, whole, replies, measured.rewards)
        columns: dict[str, Sequence[float]] = {
            **rewards,
            "gold": [] if self.judge is None else [self.judge(*pair) for pair in pairs],
            "kl": measured.kl,
            "length": [float(len(reply.ids)) for reply in replies],
            "surprise": [-reply.logprob for reply in replies],
            "finished": [float(reply.finished) for reply in replies],
            "language_changes": [float(changes_language(*pair)) for pair in pairs],
            "refusals": [float(refuses(text)) for text in texts],
        }
        return Scored(measured, texts, {name: v for name, v in columns.items() if len(v)})


def shown_prompt(messages: str) -> str:
    """A prompt as text for people: its only user turn, or the whole conversation."""
    return conversation(json.loads(messages))
