"""How much the replies of one model differ from each other.

A policy that exploits its reward answers every prompt alike, and no mean score shows it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from rlhf_core.rewards.text import words

OPENING = 3  # words, or tokens
SHOWN = 3  # openings


def variety(texts: Sequence[str]) -> dict[str, Any]:
    """Of the replies to n different prompts, in words of lower case:

    * distinct_1, distinct_2: different words, and pairs of neighbours, as shares of all of them
      (Li et al. 2016, arXiv 1510.03055); 0 where there are none.
    * top_opening: share of replies that begin with the three most common first words; opening:
      these words; openings: the most common of them, each with its share.
    * repeated: share of replies that are also the reply to another prompt.
    """
    replies = [words(text.lower()) for text in texts]
    shares = [[" ".join(opening), share] for opening, share in openings(replies)]
    count = Counter(text.strip() for text in texts)
    return {
        "distinct_1": _distinct([word for reply in replies for word in reply]),
        "distinct_2": distinct_2(replies),
        "top_opening": shares[0][1] if shares else 0.0,
        "opening": shares[0][0] if shares else "",
        "openings": shares,
        "repeated": sum(n for n in count.values() if n > 1) / max(1, len(texts)),
    }


def openings(replies: Sequence[Sequence[Any]]) -> list[tuple[tuple[Any, ...], float]]:
    """The most common beginnings of replies, each a list of words or of token ids, with the share
    of the replies that begin so; the most common one first."""
    count = Counter(tuple(reply[:OPENING]) for reply in replies)
    return [(opening, n / len(replies)) for opening, n in count.most_common(SHOWN)]


def distinct_2(replies: Sequence[Sequence[Any]]) -> float:
    """Different pairs of neighbours in replies, each a list of words or of token ids, as a share of
    all of them; 0 where there are none."""
    return _distinct([pair for reply in replies for pair in pairwise(reply)])


def _distinct(grams: Sequence[Any]) -> float:
    return len(set(grams)) / len(grams) if grams else 0.0
