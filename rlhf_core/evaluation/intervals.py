"""Paired bootstrap: intervals of the difference between two models on the same prompts.

Efron & Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13: percentile intervals of
resampled rows; both models' numbers of a row stay together, so what a prompt does to both cancels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 2000
MOST_UNITS = 1000  # that are resampled: of many rows, drawing takes minutes and gigabytes
LEVEL = 0.95


@functools.lru_cache(maxsize=4)  # all numbers of an evaluation have the same rows
def resampled_counts(n: int, seed: int) -> Any:
    """How often each of n rows stands in each resample, drawn with replacement: (RESAMPLES,n).

    Equal n and seed give equal resamples.
    """
    generator = np.random.default_rng([seed, n])
    return generator.multinomial(n, np.full(n, 1 / n), RESAMPLES)


def bounds(values: Any) -> dict[str, float]:
    """The central 95 % of resampled values."""
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return {"low": float(low), "high": float(high)}


def difference(
    ours: Sequence[float],
    theirs: Sequence[float],
    seed: int,
    weights: tuple[Sequence[float], Sequence[float]] | None = None,
) -> dict[str, float]:
    """Mean of ours minus mean of theirs over n rows, with the paired interval.

    Beyond MOST_UNITS rows, neighbours are drawn together, as many in each unit, which gives the
    same interval for independent rows.

    Args:
        weights: what the sums of ours and theirs are divided by, such as tokens; None: n rows.
    """
    ones = np.ones(len(ours))
    own, other = weights or (ones, ones)
    rows = np.stack([np.asarray(c, dtype=float) for c in (ours, own, theirs, other)], axis=1)

    def value(sums: Any) -> Any:
        return sums[..., 0] / sums[..., 1] - sums[..., 2] / sums[..., 3]

    found = float(value(rows.sum(axis=0)))
    together = -(-len(rows) // MOST_UNITS)
    units = np.add.reduceat(rows, np.arange(0, len(rows), together))
    return {
        "mean": found,
        **bounds(value(resampled_counts(len(units), seed) @ units)),
        "n": len(rows),
    }
