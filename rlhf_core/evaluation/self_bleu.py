"""Self-BLEU: how much each reply repeats the others (Zhu et al. 2018, "Texygen", 1802.01886).

Not sacrebleu: it would match each of n replies with n - 1 references one by one, in n² passes, and
brings lxml. Here the two largest counts of each n-gram answer for all references at once.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

from rlhf_core.rewards.text import words

ORDER = 4  # n-grams of 1 to 4 words, as in BLEU (Papineni et al. 2002)


def self_bleu(texts: Sequence[str]) -> float:
    """Corpus BLEU-4, 0 to 1, of all replies, each with all others as its references, not smoothed.

    0 if no reply shares four words in a row with another; 1 if each is also another's.
    """
    replies = [words(text.lower()) for text in texts]
    precisions = [_precision(replies, n) for n in range(1, ORDER + 1)]
    if len(replies) < 2 or min(precisions) == 0.0:
        return 0.0
    logs = sum(math.log(p) for p in precisions) / ORDER
    return math.exp(logs) * _brevity_penalty([len(reply) for reply in replies])


def _precision(replies: Sequence[Sequence[str]], n: int) -> float:
    """Share of all n-grams that occur in another reply, at most as often as in any one of them."""
    counts = [Counter(zip(*(reply[i:] for i in range(n)), strict=False)) for reply in replies]
    largest: dict[tuple[str, ...], tuple[int, int]] = {}  # the two largest counts in one reply
    for count in counts:
        for gram, times in count.items():
            first, second = largest.get(gram, (0, 0))
            largest[gram] = (times, first) if times > first else (first, max(second, times))
    matched = total = 0
    for count in counts:
        for gram, times in count.items():
            first, second = largest[gram]
            matched += min(times, first if times < first else second)
            total += times
    return matched / total if total else 0.0


def _brevity_penalty(lengths: Sequence[int]) -> float:
    """Of replies that are shorter than the closest other one, of two such the shorter."""
    count, known = Counter(lengths), sorted(set(lengths))
    total = 0
    for length in lengths:
        at = bisect_left(known, length)
        others = [length] if count[length] > 1 else known[max(0, at - 1) : at] + known[at + 1 :][:1]
        total += min(others, key=lambda other: (abs(other - length), other))
    return math.exp(min(0.0, 1 - total / sum(lengths)))
