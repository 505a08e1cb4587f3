"""Rewards of online reinforcement learning: a weighted sum of scores of a reply.

Most rules return 1 for a wanted reply and 0 for the opposite; a negative weight inverts a rule.
docs/rewards.md has the table.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from rlhf_core.jobs.base import LARGEST, PositiveInt
from rlhf_core.jobs.reward_services import CodeReward, HttpReward, JudgeReward
from rlhf_core.jobs.weighted import WeightedReward

Seconds = Annotated[float, Field(gt=0.0, le=LARGEST)]


class ModelReward(WeightedReward):
    """Score of the trained reward model."""

    type: Literal["model"] = "model"
    """Type of the reward."""


class EnvironmentReward(WeightedReward):
    """What the environment gave in an episode's steps, summed (setting `environment`)."""

    type: Literal["environment"] = "environment"
    """Type of the reward."""


class LengthReward(WeightedReward):
    """Length of the reply: 1 / (1 + d²) with d = (length - target) / width. 1 at the target, 1/2 at
    target ± width, towards 0 beyond."""

    type: Literal["length"] = "length"
    """Type of the reward."""
    target: Annotated[float, Field(ge=0.0, le=LARGEST)]
    """Length with reward 1, in `unit`."""
    width: Annotated[float, Field(gt=0.0, le=LARGEST)]
    """Distance from the target with reward 1/2, in `unit`."""
    unit: Literal["words", "characters"] = "words"
    """Unit of the length. A Chinese or Japanese character is a word."""


class LengthPenaltyReward(WeightedReward):
    """Penalty for long replies: 0 up to `start`, falling linearly to -1 at `end`, -1 beyond (soft
    overlong punishment, arXiv 2503.14476)."""

    type: Literal["length_penalty"] = "length_penalty"
    """Type of the reward."""
    start: Annotated[float, Field(ge=0.0, le=LARGEST)]
    """Length up to which nothing is subtracted, in `unit`."""
    end: Annotated[float, Field(gt=0.0, le=LARGEST)]
    """Length from which on the penalty is 1, in `unit`."""
    unit: Literal["tokens", "words", "characters"] = "tokens"
    """Unit of the length. Tokens include the end of turn; a Chinese or Japanese character is a
    word."""

    @field_validator("end")
    @classmethod
    def _after_the_start(cls, value: float, info: ValidationInfo) -> float:
        start = info.data.get("start", 0.0)
        if value <= start:
            raise ValueError(f"end is {value:g} and start {start:g}; expected a greater end")
        return value


class RegexReward(WeightedReward):
    """1 if the pattern matches, else 0."""

    type: Literal["regex"] = "regex"
    """Type of the reward."""
    pattern: str
    """Regular expression (package `regex`, a superset of Python's `re`)."""
    mode: Literal["search", "fullmatch"] = "search"
    """search: match anywhere in the reply. fullmatch: match the whole reply."""
    ignore_case: bool = False
    """Ignore upper and lower case."""

    @field_validator("pattern")
    @classmethod
    def _sound(cls, value: str) -> str:
        return _compiles(value)


class MustEndReward(WeightedReward):
    """1 if the reply ends as required, else 0."""

    type: Literal["must_end"] = "must_end"
    """Type of the reward."""
    endings: tuple[str, ...] = ()
    """Texts; the reply must end with one of them, before trailing white space. Empty: any
    ending."""
    end_of_turn: bool = True
    """Require the end-of-turn token: the reply was not cut."""

    @field_validator("endings")
    @classmethod
    def _no_empty_one(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(not text.strip() for text in value):
            raise ValueError("endings holds an empty text, with which every reply ends; remove it")
        return value

    @field_validator("end_of_turn")
    @classmethod
    def _something_to_look_for(cls, value: bool, info: ValidationInfo) -> bool:
        if not value and not info.data.get("endings", True):
            raise ValueError(
                "endings is empty and end_of_turn is false, so every reply would get 1; give "
                "endings, or set end_of_turn"
            )
        return value


class ForbiddenWordsReward(WeightedReward):
    """0 if one of the words occurs, else 1."""

    type: Literal["forbidden_words"] = "forbidden_words"
    """Type of the reward."""
    words: tuple[str, ...]
    """Words or phrases. They match in any case and only as whole words; in Chinese and Japanese,
    which do not separate words, anywhere."""

    @field_validator("words")
    @classmethod
    def _some(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or any(not word.strip() for word in value):
            found = "holds an empty text" if value else "is empty"
            raise ValueError(f"words {found}; give at least one word, and no empty ones")
        return value


class RepetitionReward(WeightedReward):
    """1 minus the fraction of repeated n-grams in the reply: 1 if nothing repeats."""

    type: Literal["repetition"] = "repetition"
    """Type of the reward."""
    n: PositiveInt = 3
    """Length of an n-gram in words. A Chinese or Japanese character is a word."""


class LanguageReward(WeightedReward):
    """Fraction of the words in a language's script, 0 to 1; 0 without any letter.

    Only the script counts: French counts as English, Japanese kanji as Chinese.
    """

    type: Literal["language"] = "language"
    """Type of the reward."""
    language: Literal["english", "chinese"]
    """english: words of Latin letters; chinese: Han characters, each one a word."""


class AnswerReward(WeightedReward):
    """1 if the reply contains the row's answer (column `answer` of the prompts), else 0."""

    type: Literal["answer"] = "answer"
    """Type of the reward."""
    match: Literal["exact", "numeric"] = "exact"
    """exact: equal, ignoring case, width, white space, and punctuation at both ends. numeric: the
    last numbers of both are equal, with their brackets and units (1,234.5, 3/4, 50%, 1e-3, [0,1),
    12:30). What cannot be read is not equal, and is counted."""
    pattern: str | None = None
    r"""Regular expression that finds the answer: the first group of its last match in the reply,
    for example `####\s*(.*)`. No match: 0. It also applies to the row's answer if it matches there.
    Empty: the whole reply is the answer."""
    tolerance: Annotated[float, Field(ge=0.0, lt=1.0)] = 1e-6
    """Largest relative difference of two equal numbers."""
    without_answer: float | None = None
    """Reward for rows without an answer (numeric: without a number in it). Empty: an error."""

    @field_validator("pattern")
    @classmethod
    def _sound(cls, value: str | None) -> str | None:
        return value if value is None else _compiles(value)


class SentimentReward(WeightedReward):
    """Sentiment of the reply by VADER's English lexicon, -1 (negative) to 1 (positive)."""

    type: Literal["sentiment"] = "sentiment"
    """Type of the reward."""


class ReasoningGymReward(WeightedReward):
    """Score of the row's reasoning-gym verifier, 0 to 1, for prompts from reasoning-gym:TASK."""

    type: Literal["reasoning_gym"] = "reasoning_gym"
    """Type of the reward."""
    pattern: str | None = r"(?s)<answer>\s*(.*?)\s*</answer>"
    """Regular expression that finds the answer: the first group of its last match in the reply. No
    match: 0. Empty: the whole reply is the answer."""
    time_limit: Seconds = 5.0
    """Time limit of the verifier for one reply in seconds. Beyond it, the reply gets 0 and is
    counted."""
    without_answer: float | None = None
    """Reward for rows that are not from reasoning-gym. Empty: an error."""

    @field_validator("pattern")
    @classmethod
    def _sound(cls, value: str | None) -> str | None:
        return value if value is None else _compiles(value)


class PythonReward(WeightedReward):
    """Result of your own function, called with a batch of replies."""

    type: Literal["python"] = "python"
    """Type of the reward."""
    function: str
    """package.module:function. The module must be importable where the stage runs."""
    version: str = ""
    """Change this when the function computes something else. A finished stage is reused while its
    settings stay the same, and the function's code is not part of them."""
    time_limit: Seconds = 60.0
    """Time limit of one call in seconds. The stage fails beyond it."""

    @field_validator("function")
    @classmethod
    def _path(cls, value: str) -> str:
        name = r"[^\W\d]\w*(\.[^\W\d]\w*)*"
        if not re.fullmatch(f"{name}:{name}", value):
            raise ValueError(
                f"{value[:100]!r} is not the path of a function; use "
                "package.module:function, such as my_rewards:brevity"
            )
        return value


Reward = (
    ModelReward
    | EnvironmentReward
    | LengthReward
    | LengthPenaltyReward
    | RegexReward
    | MustEndReward
    | ForbiddenWordsReward
    | RepetitionReward
    | LanguageReward
    | AnswerReward
    | SentimentReward
    | ReasoningGymReward
    | PythonReward
    | HttpReward
    | JudgeReward
    | CodeReward
)
"""A reward; a plain union, because `Field(discriminator=...)` breaks Prefect's form."""


VERIFIERS = (AnswerReward, ReasoningGymReward)
"""Rewards that compare a reply with the prompt's known answer."""


OF_FORM = (
    LengthReward,
    LengthPenaltyReward,
    RegexReward,
    MustEndReward,
    ForbiddenWordsReward,
    RepetitionReward,
    LanguageReward,
)
"""Rewards for the form of a reply, whatever it says."""


def reward_names(rewards: Sequence[Reward]) -> list[str]:
    """A name for each reward, for metrics: its type, with -2, -3 for further rewards of the
    type."""
    seen: Counter[str] = Counter()
    names = []
    for reward in rewards:
        seen[reward.type] += 1
        again = seen[reward.type]
        names.append(reward.type if again == 1 else f"{reward.type}-{again}")
    return names


def _compiles(pattern: str) -> str:
    import regex

    try:
        regex.compile(pattern)
    except Exception as error:  # the package raises more than its own error for odd patterns
        raise ValueError(
            f"{pattern[:100]!r} is not a regular expression ({error}); correct it, and put "
            "backslashes in single quotes in YAML"
        ) from None
    return pattern
