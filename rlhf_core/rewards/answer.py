"""Compares a reply with the expected answer, as text or as a number."""

from __future__ import annotations

import math
import unicodedata

import regex

_PUNCTUATION = ".,!?;:'\"`*$()[]{}…。，、！？；：“”‘’《》「」【】（）"
_FRONT = _PUNCTUATION.replace(".", "")  # .5 is not 5
_PLAIN = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = regex.compile(
    # A sign counts only if it cannot be a minus between two values: 7-3 ends with 3.
    rf"(?P<sign>(?<![\w.)\]%])[-+])?[$€£¥]?"
    rf"(?:(?:(?P<mixed>\d+)\s+)?(?P<above>{_PLAIN})\s*/\s*(?P<below>{_PLAIN})"
    rf"|(?P<value>{_PLAIN})(?P<exponent>[eE][-+]?\d+)?)"
    r"\s*(?P<percent>%|(?i:percent\b))?",
    regex.ASCII,
)
_FRACTION = regex.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")


def normalise_answer(text: str) -> str:
    """The text with case, character width and white space normalised, without outer punctuation."""
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    while (shorter := plain.rstrip(_PUNCTUATION).lstrip(_FRONT).strip()) != plain:
        plain = shorter
    return plain


def exact_match(reply: str, answer: str) -> bool:
    """Whether reply and answer are equal after `normalise_answer`."""
    return normalise_answer(reply) == normalise_answer(answer)


def last_number(text: str) -> tuple[float, bool] | None:
    """The last number of a text, and whether a percent sign follows it; None without a number.

    Supports thousands separators (1,234), decimals, exponents, fractions (3/4, 1 1/2, and LaTeX's
    \\frac{3}{4}) and full-width digits. A division by zero or a value beyond a float is no number.
    """
    plain = unicodedata.normalize("NFKC", text).replace("\u2212", "-").replace("\u2044", "/")
    if "\\" in plain:
        plain = _FRACTION.sub(_fraction, plain).replace("\\%", "%")
    found = None
    for found in _NUMBER.finditer(plain):  # noqa: B007
        pass
    if found is None:
        return None
    if found["value"]:
        value = float(found["value"].replace(",", "") + (found["exponent"] or ""))
    else:
        below = float(found["below"].replace(",", ""))
        if not below:
            return None
        value = float(found["above"].replace(",", "")) / below + float(found["mixed"] or 0)
    if not math.isfinite(value):
        return None
    return (-value if found["sign"] == "-" else value), found["percent"] is not None


def _fraction(match: regex.Match[str]) -> str:
    """3/4 for \\frac{3}{4}; a space separates a preceding integer, giving a mixed number."""
    glued = match.string[: match.start()][-1:].isdigit()
    return f"{' ' if glued else ''}{match[1]}/{match[2]}"


def numeric_match(reply: str, answer: str, tolerance: float) -> bool:
    """Whether the last numbers are equal up to a relative tolerance; False if one is missing.

    If only one of them has a percent sign, 50% equals both 0.5 and 50.
    """
    given, wanted = last_number(reply), last_number(answer)
    if given is None or wanted is None:
        return False
    pairs = [(given[0], wanted[0])]
    if given[1] and not wanted[1]:
        pairs.append((given[0] / 100, wanted[0]))
    if wanted[1] and not given[1]:
        pairs.append((given[0], wanted[0] / 100))
    return any(math.isclose(a, b, rel_tol=tolerance) for a, b in pairs)
