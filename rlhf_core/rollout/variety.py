"""How much the replies of one model differ from each other.

A policy that exploits its reward answers every prompt alike, and no mean score shows it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from rlhf_core.rewards.text import words

OPENING = 3  # words
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
    openings = Counter(" ".join(reply[:OPENING]) for reply in replies)
    total = max(1, len(texts))
    shares = [[opening, count / total] for opening, count in openings.most_common(SHOWN)]
    count = Counter(text.strip() for text in texts)
    return {
        "distinct_1": _distinct([word for reply in replies for word in reply]),
        "distinct_2": _distinct([pair for reply in replies for pair in pairwise(reply)]),
        "top_opening": shares[0][1] if shares else 0.0,
        "opening": shares[0][0] if shares else "",
        "openings": shares,
        "repeated": sum(n for n in count.values() if n > 1) / total,
    }


def _distinct(grams: Sequence[Any]) -> float:
    return len(set(grams)) / len(grams) if grams else 0.0
