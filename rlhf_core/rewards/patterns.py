"""Regular expressions on replies, with a time limit against catastrophic backtracking."""

from __future__ import annotations

from collections import Counter
from typing import Any

import regex

TIME_LIMIT = 1.0  # seconds for one reply; a normal pattern takes microseconds


def matches(
    pattern: Any, text: str, mode: str, failures: Counter[str], seconds: float = TIME_LIMIT
) -> bool:
    """Whether a compiled pattern matches.

    Args:
        mode: "search" or "fullmatch".
        failures: counts a timeout, which is no match, as "regex_timeout".
        seconds: time limit.
    """
    look = pattern.search if mode == "search" else pattern.fullmatch
    try:
        return look(text, timeout=seconds) is not None
    except TimeoutError:
        failures["regex_timeout"] += 1
        return False


def extract(
    pattern: Any, text: str, failures: Counter[str], seconds: float = TIME_LIMIT
) -> str | None:
    """The first matching group of the last match, or the whole match without groups; or None.

    Args:
        failures, seconds: as in `matches`.
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


def compile_pattern(pattern: str, ignore_case: bool = False) -> Any:
    """A compiled pattern of the package `regex`, which supports timeouts."""
    return regex.compile(pattern, regex.IGNORECASE if ignore_case else 0)
