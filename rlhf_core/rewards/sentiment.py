"""The sentiment reward: the lexicon-based score of VADER."""

from __future__ import annotations

from collections.abc import Callable

from rlhf_core.errors import ConfigError
from rlhf_core.judges.lexicon import get_judge


def sentiment_score() -> Callable[[str], float]:
    """A function that returns VADER's compound score of a text, -1 to 1.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        judge = get_judge("vader")
    except ImportError as error:
        raise ConfigError(
            "The reward sentiment needs the package vaderSentiment; run: pip install vaderSentiment"
        ) from error
    return lambda text: judge("", text)
