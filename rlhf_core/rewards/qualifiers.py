"""Words beside a number that change what it says: "at least 5" is not 5.

They become part of the value, which is then unreadable, unless both texts have the same words.
"""

from __future__ import annotations

import regex

_OF = "half|halves|thirds?|quarters?|fifths?|tenths?|roots?|squares?|cubes?|factorials?|logs?"
_OF += "|logarithms?|reciprocals?|inverses?|multiples?|factors?|divisors?|powers?"
BEFORE = (
    r"(?:(?:no|not) )?\p{L}+ than(?: or equal to)?", "at (?:the )?(?:least|most)", "up to", "about",
    r"around", r"approx(?:imately|\.)?", "roughly", "nearly", "almost", "circa", "close to", "near",
    "over", "under", "above", "below", "beyond", "exceeding", "between",
    "not(?: equal to| exactly)?", "never", "except(?: for)?", "twice", "thrice", "double", "triple",
    rf"(?:{_OF}) of", "half", r"(?:divided|multiplied|divisible|increased|decreased) by",
    "out of", "per", "(?:for|in) every", "to the power(?: of)?",
    "至少|最少|最多|至多|不少于|不多于|不超过|超过|大于|小于|多于|少于|不到|低于|高于|大约|大概|约|接近|将近|不是",
)  # fmt: skip
BETWEEN = "to the|to|of|by|times|through|versus|vs|remainder|point"
AFTER = (
    "or (?:more|less|fewer|greater|higher|lower|above|below|over|under|so)",
    "(?:and|or) (?:more|above|over|up|upwards|below|under|less)", "at (?:the )?(?:least|most)",
    r"and (?:a|an|one|two|three) (?:half|third|quarter|fifth)s?|and three[- ]quarters",
    "squared", "cubed", "factorial", "plus",
    "以上|以下|以内|左右|多",
)  # fmt: skip


def _pattern(*phrases: str) -> str:
    """Whole words in any case, with any white space between them; Chinese words anywhere."""
    text = "|".join(phrases).replace(" ", r"\s+")
    return rf"(?i:(?<![a-zA-Z])(?:{text})(?![a-zA-Z]))"


PATTERN = rf"{_pattern(*AFTER, *BEFORE)}|{_pattern(BETWEEN)}(?=\W*\d)|-?ish(?!\w)"
_AFTER = regex.compile(_pattern(*AFTER) + "|-?ish")
_BETWEEN = regex.compile(_pattern(BETWEEN))


def is_after(text: str) -> bool:
    """Whether words qualify a number before them, as "or more" does."""
    return _AFTER.fullmatch(text) is not None


def is_between(text: str) -> bool:
    """Whether words qualify a number only with another one before them, as "5 to" does."""
    return _BETWEEN.fullmatch(text) is not None
