"""Judges that score a reply with a lexicon.

Each has a lexicon of its own, so one of them can check what was trained on the other's labels.
"""

from __future__ import annotations

from collections.abc import Callable

from rlhf_core.errors import ConfigError

Judge = Callable[[str, str], float]
"""prompt, reply -> score; higher is better."""

PACKAGES = {"vader": "vaderSentiment", "textblob": "textblob"}
"""Judge -> the package that it needs."""


def get_judge(name: str) -> Judge:
    """A judge by name.

    Raises:
        ConfigError: no judge has that name.
    """
    known = {"vader": _vader, "textblob": _textblob}
    if name not in known:
        raise ConfigError(f"There is no judge named {name!r}; known: {', '.join(known)}.")
    score = known[name]()
    return lambda prompt, reply: score(reply)


def _vader() -> Callable[[str], float]:
    """Sentiment of the reply, -1 (negative) to 1 (positive): VADER's compound score.

    Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
    Text", ICWSM 2014.
    """
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return lambda text: float(analyzer.polarity_scores(text)["compound"])


def _textblob() -> Callable[[str], float]:
    """Polarity of the reply, -1 (negative) to 1 (positive): mean over the words that the lexicon
    knows, with negations and intensifiers.

    The lexicon is that of De Smedt & Daelemans, "Pattern for Python", JMLR 13 (2012): adjectives of
    product reviews. VADER's was rated for social media, so the two were made apart.
    """
    from textblob import TextBlob

    return lambda text: float(TextBlob(text).sentiment.polarity)
