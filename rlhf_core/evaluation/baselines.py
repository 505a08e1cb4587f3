"""Baselines of a reward model: reply length, and a bag of words.

A reward model that does not beat both on held-out pairs has learned nothing beyond them.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_core.training.probe import logistic

Pair = tuple[str, str]  # chosen, rejected

_FEATURES = 2**14
_MAX_PAIRS = 4_000


def length_margins(train: Sequence[Pair], heldout: Sequence[Pair]) -> list[float]:
    """Held-out margins of "the longer reply wins", or the shorter if that was so in training."""
    longer = sum((len(c) > len(r)) - (len(c) < len(r)) for c, r in train)
    sign = 1.0 if longer >= 0 else -1.0
    return [sign * (len(c) - len(r)) for c, r in heldout]


def bag_of_words_margins(
    train: Sequence[Pair], heldout: Sequence[Pair], l2: float = 1.0
) -> list[float]:
    """Held-out margins of a logistic regression on hashed word and bigram counts.

    Args:
        l2: penalty on the squared weights, summed over all training pairs.
    """
    if not train or not heldout:
        return [0.0] * len(heldout)
    train = train[:_MAX_PAIRS]  # the features are dense
    x = torch.stack([_counts(c) - _counts(r) for c, r in train])  # (n, features)
    used = x.abs().sum(dim=0) > 0
    weight = logistic(x[:, used], l2)
    return [float((_counts(c) - _counts(r))[used] @ weight) for c, r in heldout]


def _counts(text: str) -> Tensor:
    # Words of spaced scripts, single characters of the others.
    words = re.findall(r"[a-z0-9']+|[^\x00-\x7f]|[!?.,;:]", text.lower())
    counts = torch.zeros(_FEATURES)
    for token in [*words, *(" ".join(pair) for pair in itertools.pairwise(words))]:
        counts[zlib.crc32(token.encode()) % _FEATURES] += 1.0
    return counts
