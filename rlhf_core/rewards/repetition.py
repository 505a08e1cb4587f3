"""The repetition reward: how few n-grams of a reply are repeated."""

from __future__ import annotations

from rlhf_core.rewards.text import words


def repetition_score(text: str, n: int) -> float:
    """Share of distinct word n-grams, in (0, 1]; 1 for a text of fewer than n words.

    It ignores case.
    """
    found = words(text.casefold())
    grams = [tuple(found[start : start + n]) for start in range(len(found) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0
