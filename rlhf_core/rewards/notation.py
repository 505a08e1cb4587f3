"""Rewrites Unicode and LaTeX notation so that one form is left of each thing."""

from __future__ import annotations

import unicodedata

import regex

_UP = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-", strict=True))
_DOWN = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_RAISED = regex.compile("[" + "".join(_UP) + "]+")
_LOWERED = regex.compile("[" + "".join(_DOWN) + "]+")
_VULGAR = regex.compile("[¼-¾⅐-⅞]")

# Marks of one character that LaTeX commands become. ⦃ ⦄ are the braces of a set, ⟦ ⟧ those of a
# matrix with cells & and rows ⏎, and ¦ ends what belongs to a value.
_COMMANDS = {
    "times": "*", "cdot": "*", "ast": "*", "div": "/", "pm": "±", "mp": "±", "le": "≤", "leq": "≤",
    "leqslant": "≤", "ge": "≥", "geq": "≥", "geqslant": "≥", "lt": "<", "gt": ">", "ne": "≠",
    "neq": "≠", "cup": "∪", "infty": "∞", "pi": "π", "circ": "°", "degree": "°", "in": "¦",
    "approx": "¦", "equiv": "¦", "to": "¦", "rightarrow": "¦", "Rightarrow": "¦", "implies": "¦",
    "boxed": "¦", "fbox": "¦", "lbrace": "⦃", "rbrace": "⦄", "left": "", "right": "", "big": "",
    "Big": "", "bigl": "", "bigr": "", "Bigl": "", "Bigr": "", "displaystyle": "", "quad": " ",
    "qquad": " ", "text": "", "textbf": "", "textrm": "", "textit": "", "mathrm": "", "mathbf": "",
    "mbox": "", "operatorname": "", "dfrac": r"\frac", "tfrac": r"\frac", "cfrac": r"\frac",
    "dollar": "$", "lbrack": "[", "rbrack": "]",
}  # fmt: skip
_COMMAND = regex.compile(r"\\([a-zA-Z]+)")
_SYMBOLS = {
    "{,}": ",", "{:}": ":", r"\!": "", r"\,": " ", r"\;": " ", r"\:": " ", r"\ ": " ", "~": " ",
    r"\{": "⦃", r"\}": "⦄", r"\%": "%", r"\(": "¦", r"\)": "¦", r"\[": "¦",
    r"\]": "¦", "×": "*", "·": "*", "⋅": "*", "÷": "/", "<=": "≤",
    ">=": "≥", "!=": "≠", "+/-": "±", "==": "=", "≈": "¦", "→": "¦", "⇒": "¦", "∈": "¦", "º": "°",
    "˚": "°", "√": r"\sqrt",
}  # fmt: skip
_SYMBOL = regex.compile("|".join(regex.escape(key) for key in _SYMBOLS))
_MATRIX = regex.compile(r"\\(begin|end)\s*\{[a-zA-Z]*(?:matrix|array)\}(?:\{[lcr|]*\})?")
_ROW = regex.compile(r"\\\\(?![a-zA-Z])")
_TEXT = regex.compile(r"\\(?:text(?:bf|rm|it)?|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_DOLLARS = regex.compile(r"(?<!\\)\$\$?([^$\n]+)\$\$?(?!\d)")
_BOXED = regex.compile(r"\\(?:boxed|fbox)\s*(\{((?:[^{}]++|(?1))*+)\})")
_SIGN_WORDS = {
    "minus": "-", "negative": "-", "plus": "+", "plusorminus": "±", "负": "-", "~": " about ",
}  # fmt: skip
_SIGN_WORD = regex.compile(
    r"(?i)(?:(?<![a-zA-Z])(?:plus\s+or\s+minus|minus|negative|plus)\s+|负\s*|(?<!\S)~)"
    r"(?=[\d.$(\\-])"
)
_DOLLAR = "\ue000"  # an escaped one, while the others are matched in pairs
_TAG = regex.compile(r"</?[a-zA-Z]\w+/?>")
_DEGREE = regex.compile(r"\^\s*(?:\{\s*(?:°|\\circ)\s*\}|°|\\circ(?![a-zA-Z]))")


def unicode_form(text: str) -> str:
    """NFKC, but with a power as ^{2}, an index as _{2} and ½ apart from the integer before it.

    NFKC alone makes 52 of 5², and 11/2 of 1½.
    """
    text = _RAISED.sub(lambda m: "^{" + "".join(_UP[c] for c in m[0]) + "}", text)
    text = _LOWERED.sub(lambda m: "_{" + "".join(_DOWN[c] for c in m[0]) + "}", text)
    text = _VULGAR.sub(lambda m: " " + unicodedata.normalize("NFKC", m[0]), text)
    text = unicodedata.normalize("NFKC", text.replace("º", "°"))
    text = text.replace("\u2044", "/").replace("\u2212", "-")
    if not text.isascii():
        text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)
    return text


def plain_form(text: str) -> str:
    """The text with the notation of LaTeX and Unicode rewritten to the marks of this module."""
    text = unicode_form(text)
    if "\\" in text:
        text = _BOXED.sub(r"¦\2¦", text)
        text = _DEGREE.sub("°", text)
        text = _MATRIX.sub(lambda m: "⟦" if m[1] == "begin" else "⟧", text)
        text = _ROW.sub("⏎", text)
        text = _TEXT.sub(r" \1 ", text)
    text = _SIGN_WORD.sub(lambda m: _SIGN_WORDS["".join(m[0].casefold().split())], text)
    text = _TAG.sub("¦", text).replace(r"\$", _DOLLAR)
    text = _DOLLARS.sub(r"¦\1¦", text).replace(_DOLLAR, "$")
    text = _SYMBOL.sub(lambda m: _SYMBOLS[m[0]], text)
    text = _COMMAND.sub(lambda m: _COMMANDS.get(m[1], m[0]), text)
    text = regex.sub(r"\^\s*°", "°", text)
    text = regex.sub(r"(?<=\d)(?:st|nd|rd|th)\b", "", text)
    # 2**3 is a power; other double stars are Markdown's bold.
    text = regex.sub(r"(?<=[\w)])\*\*(?=[\d(-])", "^", text)
    return text.replace("**", "¦").replace("__", "¦")
