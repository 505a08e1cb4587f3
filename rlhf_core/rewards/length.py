"""The length rewards: how close a reply's length is to a target, and a penalty for long ones."""

from __future__ import annotations

from rlhf_core.rewards.text import words


def length_score(text: str, target: float, width: float, unit: str) -> float:
    """1 / (1 + ((length - target) / width)²), in (0, 1].

    Heavy tails on purpose: a Gaussian is 0 for all replies far from the target, and equal scores
    give no signal.

    Args:
        target, width: in `unit`, "words" or "characters" (code points).
    """
    distance = (text_length(text, unit) - target) / width
    return 1.0 / (1.0 + distance * distance)


def length_penalty(length: float, start: float, end: float) -> float:
    """0 up to `start`, (start - length) / (end - start) up to `end`, then -1 (arXiv 2503.14476,
    equation 13)."""
    return -min(1.0, max(0.0, (length - start) / (end - start)))


def text_length(text: str, unit: str) -> int:
    """Length of a text in "words" or "characters" (code points)."""
    return len(text) if unit == "characters" else len(words(text))
