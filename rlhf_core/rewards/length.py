"""Length of a reply against a target."""

from __future__ import annotations

from rlhf_core.rewards.text import words


def length_score(text: str, target: float, width: float, unit: str) -> float:
    """1 / (1 + ((length - target) / width)²), in (0, 1].

    Its tails are heavy on purpose: a bell curve is 0 for all replies far from the target, and what
    is equal for all replies teaches nothing.

    Args:
        target, width: in `unit`, "words" or "characters" (code points).
    """
    length = len(text) if unit == "characters" else len(words(text))
    distance = (length - target) / width
    return 1.0 / (1.0 + distance * distance)
