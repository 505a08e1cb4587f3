"""How much the replies of one model differ from each other.

A policy that exploits its reward answers every prompt alike, and no mean score shows it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

OPENING = 3  # words
WORD = re.compile(r"\w+(?:['’]\w+)*")  # "I'm" is one


def variety(texts: Sequence[str]) -> dict[str, Any]:
    """Of the replies to n different prompts, in words of lower case:

    * distinct_1, distinct_2: different words, and pairs of neighbours, as shares of all of them
      (Li et al. 2016, arXiv 1510.03055); 0 where there are none.
    * top_opening: share of replies that begin with the three most common first words; opening:
      these words.
    * repeated: share of replies that are also the reply to another prompt.
    """
    replies = [WORD.findall(text.lower()) for text in texts]
    openings = Counter(" ".join(words[:OPENING]) for words in replies)
    opening, most = openings.most_common(1)[0] if openings else ("", 0)
    count = Counter(text.strip() for text in texts)
    total = max(1, len(texts))
    return {
        "distinct_1": _distinct([word for words in replies for word in words]),
        "distinct_2": _distinct([pair for words in replies for pair in pairwise(words)]),
        "top_opening": most / total,
        "opening": opening,
        "repeated": sum(n for n in count.values() if n > 1) / total,
    }


def _distinct(grams: Sequence[Any]) -> float:
    return len(set(grams)) / len(grams) if grams else 0.0
