"""Compares a reply with the expected answer, as text or as a value."""

from __future__ import annotations

import math
from enum import Enum

import regex

from rlhf_core.rewards.notation import unicode_form
from rlhf_core.rewards.numbers import Number, Parts, Value
from rlhf_core.rewards.spans import last_span, written
from rlhf_core.rewards.values import read

_ENDS = ".,?;:…*`。，、！？；：“”‘’《》「」【】"
_QUOTES = "'\"$"
_BRACKETS = {"(": ")", "[": "]", "{": "}"}
_FACTORIAL = regex.compile(r"(?:[\d)\]}]|\b\w)!+$")


class Verdict(Enum):
    """Result of a comparison. UNREADABLE: neither shown to be equal nor to be different."""

    EQUAL = "equal"
    DIFFERENT = "different"
    UNREADABLE = "unreadable"


def normalise_answer(text: str) -> str:
    """The text with case, character width and white space normalised, without outer punctuation.

    Marks that may belong to the answer stay: ! after a number or a letter (a factorial), the
    brackets of what has a separator in it ([0,1) and {1,2}), and a quote on one side (5' and f').
    """
    plain = " ".join(unicode_form(text).casefold().split())
    while (shorter := _shorter(plain)) != plain:
        plain = shorter
    return plain


def _shorter(text: str) -> str:
    """The text without one layer of outer punctuation."""
    text = text.lstrip(_ENDS.replace(".", "")).strip()  # .5 is not 5
    kept = text.rstrip(_ENDS)
    endless = kept[-1:].isdigit() and text[len(kept) :].startswith("..")  # 0.333...
    text = text if endless else kept.strip()
    if text.endswith("!") and not _FACTORIAL.search(text):
        text = text.rstrip("!")
    if len(text) > 1 and text[0] == text[-1] and text[0] in _QUOTES:
        return text[1:-1].strip()
    text = text.removeprefix('"').removeprefix("$")
    if _enclosed(text):
        return text[1:-1].strip()
    if not set(text) & set("([{"):
        text = text.rstrip(")}")
    if not set(text) & set(")]}"):
        text = text.lstrip("([{")
    return text.strip()


def _enclosed(text: str) -> bool:
    """Whether one pair of brackets of the same kind is around a text without separators in it."""
    if len(text) < 2 or _BRACKETS.get(text[0]) != text[-1] or set(text) & set(",;"):
        return False
    depth = 0
    for place, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0:
            return place == len(text) - 1
    return False


def exact_match(reply: str, answer: str) -> bool:
    """Whether reply and answer are equal after `normalise_answer`."""
    return normalise_answer(reply) == normalise_answer(answer)


def has_number(text: str) -> bool:
    """Whether a text has a number in it, readable or not."""
    return last_span(text) is not None


def is_readable(answer: str) -> bool:
    """Whether an expected answer is one value, which replies can have in other words too."""
    span = last_span(answer)
    return span is not None and not _several(answer) and read(span) is not None


def numeric_match(reply: str, answer: str, tolerance: float) -> Verdict:
    """Compares the last values of two texts.

    Args:
        tolerance: largest relative difference of two equal numbers.

    Returns:
        UNREADABLE if one of them cannot be read in whole and they are not written alike; DIFFERENT
        if one is missing.
    """
    given, wanted = last_span(reply), last_span(answer)
    if wanted is not None and unicode_form(reply).split() == unicode_form(answer).split():
        return Verdict.EQUAL
    if given is None or wanted is None:
        return Verdict.DIFFERENT
    if not given or not wanted or _several(answer):
        return Verdict.UNREADABLE
    if written(given) == written(wanted):
        return Verdict.EQUAL
    one, other = read(given), read(wanted)
    if one is None or other is None:
        return Verdict.UNREADABLE
    return _compare(one, other, tolerance)


def _several(answer: str) -> bool:
    """Whether an answer has numbers on several lines or in several equations, and no words: a grid,
    or x = 2, y = 3. Its last number is not the answer, unlike that of a solution in prose."""
    parts = [part for part in regex.split(r"\n|[,;](?=[^,;\n]*=)", answer) if has_number(part)]
    return len(parts) > 1 and not regex.search(r"(?<!\\)\b\p{L}{2,}", answer)


def _compare(one: Value, other: Value, tolerance: float) -> Verdict:
    if isinstance(one, Number) and isinstance(other, Number):
        equal = _equal(one, other, tolerance)
    elif isinstance(one, Number) or isinstance(other, Number):
        kind = (
            one.kind if isinstance(one, Parts) else other.kind if isinstance(other, Parts) else ""
        )
        alone = isinstance(one, Parts) and len(one.items) == 1
        alone = alone or (isinstance(other, Parts) and len(other.items) == 1)
        # 1,5 may be a decimal or a list, 3:4 a fraction, [5] the number 5 in a list
        unclear = kind in (",", ":") or (alone and kind not in "<>≤≥≠")
        return Verdict.UNREADABLE if unclear else Verdict.DIFFERENT
    elif one.kind != other.kind:
        # A list without brackets may be a set or a tuple, 1:30 may have lost its pm.
        unclear = {one.kind, other.kind} in ({":", "clock"}, {",", "()"}, {",", "{}"}, {",", "[]"})
        return Verdict.UNREADABLE if unclear else Verdict.DIFFERENT
    elif len(one.items) != len(other.items):
        return Verdict.DIFFERENT
    elif one.kind in ("{}", "∪"):
        equal = _same_set(one, other, tolerance)
    else:
        found = [_compare(a, b, tolerance) for a, b in zip(one.items, other.items, strict=True)]
        return next((v for v in found if v is not Verdict.EQUAL), Verdict.EQUAL)
    return Verdict.EQUAL if equal else Verdict.DIFFERENT


def _same_set(one: Parts, other: Parts, tolerance: float) -> bool:
    left = list(other.items)
    for item in one.items:
        for place, candidate in enumerate(left):
            if _compare(item, candidate, tolerance) is Verdict.EQUAL:
                del left[place]
                break
    return not left


def _equal(one: Number, other: Number, tolerance: float) -> bool:
    """Whether two numbers are equal. If only one has a percent sign, 50% equals both 0.5 and 50; if
    only one has a unit, the numbers before it count."""
    if one.unit and other.unit:
        same = one.unit == other.unit
        bases = one.value * one.factor, other.value * other.factor
        return same and math.isclose(*bases, rel_tol=max(tolerance, 1e-12))
    pairs = [(one.value, other.value)]
    if one.percent and not other.percent:
        pairs.append((one.value / 100, other.value))
    if other.percent and not one.percent:
        pairs.append((one.value, other.value / 100))
    return any(math.isclose(a, b, rel_tol=tolerance) for a, b in pairs)
