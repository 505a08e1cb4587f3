"""Finds the part of a text that belongs to its last number: its sign, brackets, unit, operators."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import regex

from rlhf_core.rewards import qualifiers
from rlhf_core.rewards.notation import plain_form
from rlhf_core.rewards.units import CURRENCIES, SCALES, UNITS

MOST_TOKENS = 120
_WINDOW = (700, 300)  # characters before and after the last number that are looked at

Kind = Literal[
    "number", "operator", "open", "close", "letter", "command", "unit", "join", "words", "end"
]
_TOKEN = regex.compile(
    r"(?P<number>0[xX][0-9a-fA-F]+(?!\w)"
    r"|(?:\d{1,3}(?:,\d{3})+(?![\d])|\d{1,3}(?:[ ]\d{3})+(?!\d)|\d+)(?:\.\d+)?"
    r"(?:[eE][-+]?\d+(?![\w]))?|(?<![\d.])\.\d+(?:[eE][-+]?\d+(?![\w]))?)"
    r"|(?P<time>[ap]\.m\.)"
    rf"|(?P<words>{qualifiers.PATTERN})"
    r"|(?P<word>\\?[a-zA-Z]+|\p{L})"
    r"|(?P<open>[(\[{⦃⟦])|(?P<close>[)\]}⦄⟧])"
    r"|(?P<colon>(?<=\d)(?::|[ ]:[ ])(?=\d))"
    r"|(?P<operator>[-+*/^_!,;<>≤≥≠±%°&∪–⏎∞$€£¥]|(?<=\S)\||\|(?=\S)|(?<=\d)['.](?=[\d\\(])"
    r"|(?<=\.\d+|,[ ]?)\.\.\.)"
    r"|(?P<end>\S|\n)"
)
_LETTER = regex.compile(r"[a-zA-Z]|\p{Greek}")
_NUMERIC = regex.compile(r"[\p{Nd}\p{No}]")
_WORD_KINDS: dict[str, Kind] = {
    "and": "join", "or": "join", "percent": "operator", "sqrt": "command", "pi": "command",
    **dict.fromkeys(("log", "ln", "sin", "cos", "tan", "exp", "gcd", "lcm", "mod"), "command"),
    "infinity": "command", "π": "command",
}  # fmt: skip
_PAIRS = {"{": "}", "⦃": "⦄", "⟦": "⟧", "(": ")]", "[": ")]"}
_VALUES = ("number", "close", "unit", "command", "letter")


@dataclass(frozen=True)
class Token:
    """A part of a text.

    Attributes:
        spaced: whether white space comes before it.
    """

    kind: Kind
    text: str
    spaced: bool


def last_span(text: str) -> list[Token] | None:
    """The tokens around the last number of a text; None without a number, [] if its end is unclear.

    A word ends the span, unless it is a unit or a single letter beside an operator. So do a new
    line, an equals sign, a colon before white space, and the end of a sentence. Words that change
    the number (qualifiers.py) are part of the span.
    """
    found = [match.start() for match in _NUMERIC.finditer(text)]
    if not found:
        return None
    tokens = _tokens(plain_form(text[max(0, found[-1] - _WINDOW[0]) : found[-1] + _WINDOW[1]]))
    numbers = [place for place, token in enumerate(tokens) if token.kind == "number"]
    if not numbers:
        return []
    first = last = numbers[-1]
    while last - first < MOST_TOKENS and last + 1 < len(tokens) and _goes_on(tokens, last):
        last += 1
    while last - first < MOST_TOKENS and first > 0 and _goes_back(tokens, first):
        first -= 1
    if _qualified_later(tokens, last):
        return []
    cut = (first == 0 and found[-1] > _WINDOW[0]) or (
        last + 1 == len(tokens) and found[-1] + _WINDOW[1] < len(text)
    )
    if cut or last - first >= MOST_TOKENS:
        return []
    return _trimmed(tokens, first, last)


def _tokens(text: str) -> list[Token]:
    found, end = [], 0
    for match in _TOKEN.finditer(text):
        kind, word = match.lastgroup or "end", match[0]
        spaced = bool(text[end : match.start()]) or match.start() == 0
        end = match.end()
        if kind == "word":
            kind = _word_kind(word)
        elif kind == "words":
            word = " ".join(word.casefold().split())
        elif kind == "time":
            kind, word = "unit", word.replace(".", "")
        elif kind == "colon":
            kind, word = "operator", ":"
        found.append(Token(kind, word, spaced))  # type: ignore[arg-type]
    return found


def _word_kind(word: str) -> Kind:
    low = word.casefold()
    if word.startswith("\\"):
        return "command"
    if low in _WORD_KINDS:
        return _WORD_KINDS[low]
    if word in UNITS or low in SCALES or (len(word) > 1 and low in UNITS):
        return "unit"
    return "letter" if _LETTER.fullmatch(word) else "end"


def _goes_on(tokens: list[Token], last: int) -> bool:
    """Whether the token after the last one of a span belongs to it."""
    here, after = tokens[last], tokens[last + 1]
    match after.kind:
        case "operator" | "close":
            return True
        case "open" | "letter":
            return not after.spaced or (here.kind == "operator" and here.text not in ",;")
        case "command":
            return True
        case "words":
            return qualifiers.is_after(after.text) and here.kind != "words"
        case "unit":
            return here.kind in ("number", "close", "unit", "command") or here.text in "%°/"
    return False


def _qualified_later(tokens: list[Token], last: int) -> bool:
    """Whether a span is followed by a word and a phrase that changes it: 5 people or more."""
    if last + 2 >= len(tokens):
        return False
    word, phrase = tokens[last + 1 : last + 3]
    plain = word.kind == "end" and word.text.isalpha()
    return plain and phrase.kind == "words" and qualifiers.is_after(phrase.text)


def _goes_back(tokens: list[Token], first: int) -> bool:
    """Whether the token before the first one of a span belongs to it."""
    before, here = tokens[first - 1], tokens[first]
    further = tokens[first - 2] if first > 1 else Token("end", "", True)
    match before.kind:
        case "number" | "open" | "command":
            return True
        case "close":
            return not here.spaced or here.kind == "operator"
        case "operator":
            if before.text in ",;":
                return further.kind in _VALUES or further.text in "%°∞!"
            hyphen = before.text in "-–" and not before.spaced and not here.spaced
            return not (hyphen and further.kind == "end" and further.text.isalpha())
        case "letter":
            between = further.kind in ("number", "close", "unit") and here.kind != "operator"
            beside = here.kind == "operator" and here.text not in ",;"
            return not here.spaced or beside or between  # 17 R 3 is not 3
        case "unit":
            # A letter before a relation is a variable, though m is also a unit.
            return further.kind in ("number", "close", "unit") or (
                len(before.text) == 1 and (here.kind == "operator" or not here.spaced)
            )
        case "words":
            beside = further.kind in _VALUES or further.text in "%°"
            return beside or not qualifiers.is_between(before.text)
        case "join":
            return further.kind in ("number", "close", "unit") and here.kind != "operator"
    return False


def _trimmed(tokens: list[Token], first: int, last: int) -> list[Token]:
    """The span without separators and lone brackets at its ends; [] if a word touches it, or a lone
    bracket is left."""
    after = tokens[last + 1] if last + 1 < len(tokens) else Token("end", "", True)
    if tokens[last].text in "-–" and len(after.text) > 1:  # a 5-year plan; 5 - that is all
        last -= 1
    elif _is_word(after) and not after.spaced:
        return []
    touches = first > 0 and _is_word(tokens[first - 1])
    span = tokens[first : last + 1]
    if touches and not span[0].spaced and span[0].text not in "-–":
        return []
    while True:
        lone = _lone_brackets(span)
        if span[-1].text in (",", ";") or span[-1].kind == "join":
            span = span[:-1]
        elif span[0].text in (",", ";") or span[0].kind == "join":
            span = span[1:]
        elif len(span) - 1 in lone and span[-1].text in ")]}⦄":
            span = span[:-1]
        elif 0 in lone and span[0].text in "([{⦃":
            span = span[1:]
        else:
            return [] if lone else _without_group(span)


def _without_group(span: list[Token]) -> list[Token]:
    """The span without braces around all of it, unless they hold a set: {x^2} is x^2."""
    while len(span) > 2 and (span[0].text, span[-1].text) == ("{", "}"):
        depth = 1
        for token in span[1:-1]:
            depth += (token.kind == "open") - (token.kind == "close")
            if depth == 0 or (depth == 1 and token.text in (",", ";")):
                return span
        span = span[1:-1]
    return span


def _is_word(token: Token) -> bool:
    """Whether a token is a Latin word; Chinese ones may touch a number."""
    return token.kind == "end" and token.text.isalpha() and token.text.isascii()


def _lone_brackets(span: list[Token]) -> set[int]:
    """Positions of brackets without a partner."""
    waiting: list[int] = []
    lone: set[int] = set()
    for place, token in enumerate(span):
        if token.kind == "open":
            waiting.append(place)
        elif token.kind == "close":
            if waiting and token.text in _PAIRS[span[waiting[-1]].text]:
                waiting.pop()
            else:
                lone.add(place)
    return lone | set(waiting)


def written(span: list[Token]) -> str:
    """The span in one way of writing it: no white space, except between two numbers or two words,
    and no braces around a power or an index of one token. Equal texts have equal meanings."""
    out: list[Token] = list(span)
    for place in range(len(out) - 4, -1, -1):
        if out[place].text in "^_" and (out[place + 1].text, out[place + 3].text) == ("{", "}"):
            out[place + 1 : place + 4] = [out[place + 2]]
    text = ""
    for before, token in pairwise([Token("end", "", True), *out]):
        numbers = before.kind == token.kind == "number"
        words = before.text[-1:].isalpha() and token.text[0].isalpha()
        shown = token.text
        if token.kind == "number":
            shown = shown.replace(",", "").replace(" ", "")
        text += " " * (numbers or words) + shown
    return text


def is_currency(token: Token) -> bool:
    """Whether a token is the sign of a currency."""
    return token.text in CURRENCIES
