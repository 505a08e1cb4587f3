"""Regular expressions on replies, with a time limit against patterns that never come to an end."""

from __future__ import annotations

from collections import Counter
from typing import Any

import regex

SECONDS = 1.0  # for one reply; a sound pattern takes microseconds


def matches(
    pattern: Any, text: str, mode: str, failures: Counter[str], seconds: float = SECONDS
) -> bool:
    """Whether a compiled pattern matches.

    Args:
        mode: "search" or "fullmatch".
        failures: a search that takes longer than the time limit counts as no match, and in here.
    """
    look = pattern.search if mode == "search" else pattern.fullmatch
    try:
        return look(text, timeout=seconds) is not None
    except TimeoutError:
        failures["regex_timeout"] += 1
        return False


def extract(
    pattern: Any, text: str, failures: Counter[str], seconds: float = SECONDS
) -> str | None:
    """The last match's first group that took part (without groups: the match), or None.

    Args:
        failures: as in `matches`.
    """
    last = None
    try:
        for match in pattern.finditer(text, timeout=seconds):
            last = match
    except TimeoutError:
        failures["regex_timeout"] += 1
        return None
    if last is None:
        return None
    found: str = next((group for group in last.groups() if group is not None), last[0])
    return found


def compiled(pattern: str, ignore_case: bool = False) -> Any:
    return regex.compile(pattern, regex.IGNORECASE if ignore_case else 0)
