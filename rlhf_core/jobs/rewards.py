"""Rewards of online reinforcement learning: what scores a reply. They are summed with weights.

Most rules give 1 for what is wanted and 0 for its opposite; a negative weight turns a rule around.
docs/rewards.md has the table.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from rlhf_core.jobs.base import LARGEST, PositiveInt, Settings

Seconds = Annotated[float, Field(gt=0.0, le=LARGEST)]


class WeightedReward(Settings):
    """What every reward has."""

    weight: float = 1.0
    """Factor of the reward in the sum; a negative one turns it around."""


class ModelReward(WeightedReward):
    """Score of the trained reward model."""

    type: Literal["model"] = "model"
    """Reward kind."""


class LengthReward(WeightedReward):
    """1 at the target length, one half at target ± width, towards 0 beyond: 1 / (1 + d²) with
    d = (length - target) / width, which still tells a far reply from a farther one."""

    type: Literal["length"] = "length"
    """Reward kind."""
    target: Annotated[float, Field(ge=0.0, le=LARGEST)]
    """Length that gets 1, in `unit`."""
    width: Annotated[float, Field(gt=0.0, le=LARGEST)]
    """Distance from the target at which the reward is one half, in `unit`."""
    unit: Literal["words", "characters"] = "words"
    """What is counted; a Chinese or Japanese character is a word."""


class RegexReward(WeightedReward):
    """1 where the pattern matches, else 0."""

    type: Literal["regex"] = "regex"
    """Reward kind."""
    pattern: str
    """Regular expression (package `regex`, which knows all that Python's `re` does)."""
    mode: Literal["search", "fullmatch"] = "search"
    """search: it matches somewhere in the reply; fullmatch: it matches the whole reply."""
    ignore_case: bool = False
    """Upper and lower case are the same."""

    @field_validator("pattern")
    @classmethod
    def _sound(cls, value: str) -> str:
        return _compiles(value)


class MustEndReward(WeightedReward):
    """1 where the reply ends as it must, else 0."""

    type: Literal["must_end"] = "must_end"
    """Reward kind."""
    endings: tuple[str, ...] = ()
    """Texts with one of which the reply must end, white space after it aside; empty: any."""
    end_of_turn: bool = True
    """The reply must have ended with its end-of-turn token, so must not have been cut."""

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
                "endings is empty and end_of_turn is false, so that every reply would get 1; give "
                "endings, or set end_of_turn"
            )
        return value


class ForbiddenWordsReward(WeightedReward):
    """0 where one of the words occurs, else 1."""

    type: Literal["forbidden_words"] = "forbidden_words"
    """Reward kind."""
    words: tuple[str, ...]
    """Words or phrases, found in any case and only as whole words; in Chinese and Japanese, which
    put nothing between words, anywhere."""

    @field_validator("words")
    @classmethod
    def _some(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or any(not word.strip() for word in value):
            found = "holds an empty text" if value else "is empty"
            raise ValueError(f"words {found}; needed is at least one word, and none that is empty")
        return value


class RepetitionReward(WeightedReward):
    """1 less the share of n-grams that occurred before in the reply: 1 where nothing repeats."""

    type: Literal["repetition"] = "repetition"
    """Reward kind."""
    n: PositiveInt = 3
    """Words of an n-gram; a Chinese or Japanese character is a word."""


class LanguageReward(WeightedReward):
    """Share of the words that are in a language's script, 0 to 1; 0 without any letter.

    It goes by script alone: French counts as English, Japanese kanji as Chinese.
    """

    type: Literal["language"] = "language"
    """Reward kind."""
    language: Literal["english", "chinese"]
    """english: words of Latin letters; chinese: Han characters, each one a word."""


class AnswerReward(WeightedReward):
    """1 where the reply has the row's answer (column `answer` of the prompts), else 0."""

    type: Literal["answer"] = "answer"
    """Reward kind."""
    match: Literal["exact", "numeric"] = "exact"
    """exact: equal but for case, width, white space, and punctuation at both ends; numeric: the
    last numbers of both are equal (1,234.5, 3/4, 1 1/2, 50%, 1e-3)."""
    pattern: str | None = None
    r"""Regular expression whose last match in the reply has the answer, in its first group that
    took part: `####\s*(.*)`, say. A reply without it gets 0. It is used on the row's answer too,
    where it matches there. Empty: the whole reply."""
    tolerance: Annotated[float, Field(ge=0.0, lt=1.0)] = 1e-6
    """Relative difference up to which two numbers are equal."""
    without_answer: float | None = None
    """Reward on a row that has no answer, or with numeric no number in it; empty: an error."""

    @field_validator("pattern")
    @classmethod
    def _sound(cls, value: str | None) -> str | None:
        return value if value is None else _compiles(value)


class SentimentReward(WeightedReward):
    """Sentiment of the reply, -1 (negative) to 1 (positive), by VADER's English lexicon."""

    type: Literal["sentiment"] = "sentiment"
    """Reward kind."""


class ReasoningGymReward(WeightedReward):
    """0 to 1 by the verifier of the row's reasoning-gym task (prompts from reasoning-gym:TASK)."""

    type: Literal["reasoning_gym"] = "reasoning_gym"
    """Reward kind."""
    pattern: str | None = r"(?s)<answer>\s*(.*?)\s*</answer>"
    """Regular expression whose last match in the reply has the answer, in its first group that
    took part; a reply without it gets 0. Empty: the whole reply is the answer."""
    time_limit: Seconds = 5.0
    """Seconds that a verifier may take for one reply; one that takes longer is ended and the reply
    gets 0, which is counted."""
    without_answer: float | None = None
    """Reward on a row that is none of reasoning-gym's; empty: an error."""

    @field_validator("pattern")
    @classmethod
    def _sound(cls, value: str | None) -> str | None:
        return value if value is None else _compiles(value)


class PythonReward(WeightedReward):
    """What a function of your own gives, called with a batch of replies."""

    type: Literal["python"] = "python"
    """Reward kind."""
    function: str
    """package.module:function; the module must be importable where the stage runs."""
    version: str = ""
    """Change this whenever the function computes something else: a finished stage is reused as long
    as its settings are the same, and the function's code is not part of them."""
    time_limit: Seconds = 60.0
    """Seconds that one call may take; the stage fails when it takes longer."""

    @field_validator("function")
    @classmethod
    def _path(cls, value: str) -> str:
        name = r"[^\W\d]\w*(\.[^\W\d]\w*)*"
        if not re.fullmatch(f"{name}:{name}", value):
            raise ValueError(
                f"{value[:100]!r} is not the path of a function; needed is "
                "package.module:function, such as my_rewards:brevity"
            )
        return value


Reward = (
    ModelReward
    | LengthReward
    | RegexReward
    | MustEndReward
    | ForbiddenWordsReward
    | RepetitionReward
    | LanguageReward
    | AnswerReward
    | SentimentReward
    | ReasoningGymReward
    | PythonReward
)
"""One reward; a plain union (`Field(discriminator=...)` breaks Prefect's form)."""


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
