"""Means, standard errors and intervals of an evaluation's numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    m = mean(values)
    variance = sum((v - m) ** 2 for v in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Mean and standard error under the names `<name>_mean` and `<name>_se`."""
    return {f"{name}_mean": mean(values), f"{name}_se": standard_error(values)}


def wins(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """For each prompt 1 if ours is higher, 0 if theirs is, 0.5 for a tie."""
    return [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(ours, theirs, strict=True)]


def rate(won: Sequence[float]) -> dict[str, float]:
    """Mean of trials that each give 0 to 1, with its 95 % interval and n."""
    low, high = wilson_interval(sum(won), len(won))
    return {"rate": mean(won), "low": low, "high": high, "n": len(won)}


def wilson_interval(successes: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927); (0, 1) for no trials."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def accuracy(margins: Sequence[float]) -> dict[str, float]:
    """Share of pairs with a positive margin (ties count half), its 95 % interval, and n."""
    found = rate(wins(margins, [0.0] * len(margins)))
    return {"accuracy": found.pop("rate"), **found}
