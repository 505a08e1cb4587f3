"""The reward of the GRPO row, on both sides: a number from a reply's text, different for each."""

from __future__ import annotations

from typing import Any


def of_text(text: str) -> float:
    """Mean code point modulo 7 of the characters, 0 for an empty text."""
    return sum(ord(c) % 7 for c in text) / len(text) if text else 0.0


def even_words(
    prompts: list[Any], replies: list[str], rows: list[Any], finished: list[bool]
) -> list[float]:
    """In the form of our `python` reward."""
    return [of_text(reply) for reply in replies]
