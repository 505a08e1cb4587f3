"""The length reward: how close a reply's length is to a target."""

from __future__ import annotations

from rlhf_core.rewards.text import words


def length_score(text: str, target: float, width: float, unit: str) -> float:
    """1 / (1 + ((length - target) / width)²), in (0, 1].

    Heavy tails on purpose: a Gaussian is 0 for all replies far from the target, and equal scores
    give no signal.

    Args:
        target, width: in `unit`, "words" or "characters" (code points).
    """
    length = len(text) if unit == "characters" else len(words(text))
    distance = (length - target) / width
    return 1.0 / (1.0 + distance * distance)
