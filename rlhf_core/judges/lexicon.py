"""Judges that score a reply with a lexicon."""

from __future__ import annotations

from collections.abc import Callable

from rlhf_core.errors import ConfigError

Judge = Callable[[str, str], float]
"""prompt, reply -> score; higher is better."""


def get_judge(name: str) -> Judge:
    """A judge by name.

    Raises:
        ConfigError: no judge has that name.
    """
    if name == "vader":
        return _vader()
    raise ConfigError(f"There is no judge named {name!r}; known: vader.")


def _vader() -> Judge:
    """Sentiment of the reply, -1 (negative) to 1 (positive): VADER's compound score.

    Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
    Text", ICWSM 2014.
    """
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()

    def judge(prompt: str, reply: str) -> float:
        return float(analyzer.polarity_scores(reply)["compound"])

    return judge
