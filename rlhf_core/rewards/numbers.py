"""Reads tokens as a number with its sign, percent sign, scale and unit."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf_core.rewards.spans import Token, is_currency
from rlhf_core.rewards.units import CURRENCIES, SCALES, UNITS


@dataclass(frozen=True)
class Number:
    """A number.

    Attributes:
        value: without its unit.
        percent: whether a percent sign follows it.
        unit: dimension of its unit, such as length/time, "" without one.
        factor: of the unit to the dimension's base.
    """

    value: float
    percent: bool = False
    unit: str = ""
    factor: float = 1.0


@dataclass(frozen=True)
class Parts:
    """Values in a structure.

    Attributes:
        kind: the brackets "()", "[)", "{}" and so on, "," for a list without them, "⟦⟧" for a
            matrix, "row", ":" for times and ratios, "–" for ranges, "±", "∪", or a relation.
    """

    kind: str
    items: tuple[Value, ...]


Value = Number | Parts


class UnreadError(Exception):
    """The tokens are none of what is read."""


class NumberReader:
    """A recursive descent over tokens, its part for numbers."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.place = 0

    def ahead(self, offset: int = 0) -> Token:
        place = self.place + offset
        return self.tokens[place] if place < len(self.tokens) else Token("end", "", True)

    def take(self, *texts: str) -> bool:
        if self.ahead().text in texts and self.ahead().text:
            self.place += 1
            return True
        return False

    def closed(self, value: Value, closer: str) -> Value:
        """The value, after its closing bracket is taken."""
        if not self.take(closer):
            raise UnreadError
        return value

    def number(self) -> Value:
        """A signed number with its percent sign, scale and unit."""
        negative, signed = self.ahead().text == "-", self.take("-", "+")
        if signed and self.place == 1 and self.ahead().spaced:
            raise UnreadError  # a minus, or the bullet of a list
        currency = CURRENCIES[self.ahead().text] if is_currency(self.ahead()) else ""
        self.place += bool(currency)
        value = self.size()
        value = -value if negative else value
        scaled = False
        while self.ahead().text.casefold() in SCALES:
            value *= SCALES[self.ahead().text.casefold()]
            self.place += 1
            scaled = True
        if not scaled and self.take("%", "percent", "Percent"):
            return Number(value, percent=True)
        if is_currency(self.ahead()) and not currency:
            currency = CURRENCIES[self.ahead().text]
            self.place += 1
        if currency:
            return Number(value, unit=currency)
        return self.measured(value)

    def size(self) -> float:
        """3, 1,234.5, 1e-3, 3/4, 1 1/2, \\frac{3}{4}, 2 * 10^5, 10^5, infinity."""
        if self.take("∞", "infinity"):
            return math.inf
        return self.finite(self.fraction_or_digits())

    def finite(self, value: float) -> float:
        if not math.isfinite(value):
            raise UnreadError
        return value

    def fraction_or_digits(self) -> float:
        if self.take("\\frac"):
            return self.fraction()
        if self.ahead().text in ("(", "{"):
            closer = {"(": ")", "{": "}"}[self.ahead().text]
            self.place += 1
            inside = self.number()
            if not isinstance(inside, Number) or inside.percent or inside.unit:
                raise UnreadError
            self.closed(inside, closer)
            return inside.value
        value = self.digits()
        after, next_one = self.ahead(), self.ahead(1)
        if after.text == "\\frac" and value.is_integer():
            self.place += 1
            return value + self.fraction()
        if after.kind == "number" and after.spaced and next_one.text == "/" and value.is_integer():
            above = self.digits()
            self.place += 1
            return value + self.divided(above)
        if after.text == "/" and next_one.kind == "number":
            self.place += 1
            return self.divided(value)
        if after.text in ("*", "x") and next_one.text == "10" and self.ahead(2).text == "^":
            self.place += 2
            return value * self.power_of_ten()
        if value == 10 and after.text == "^":
            return self.power_of_ten()
        return value

    def digits(self) -> float:
        token = self.ahead()
        if token.kind != "number":
            raise UnreadError
        self.place += 1
        if token.text[:2] in ("0x", "0X"):
            return float(int(token.text, 16))
        return float(token.text.replace(",", "").replace(" ", ""))

    def divided(self, above: float) -> float:
        below = self.digits()
        if not below:
            raise UnreadError
        return above / below

    def fraction(self) -> float:
        """The two arguments of \\frac: {3}{4}, or 34, or {3}4."""
        token = self.ahead()
        if token.kind == "number" and token.text.isdecimal() and len(token.text) == 2:
            self.place += 1
            above, below = (float(digit) for digit in token.text)
        else:
            above, below = self.argument(), self.argument()
        if not below:
            raise UnreadError
        return above / below

    def argument(self) -> float:
        if self.ahead().text != "{":
            if len(self.ahead().text) > 1:
                raise UnreadError
            return self.digits()
        self.place += 1
        inside = self.number()
        if not isinstance(inside, Number) or inside.percent or inside.unit:
            raise UnreadError
        self.closed(inside, "}")
        return inside.value

    def power_of_ten(self) -> float:
        """What follows the 10 of a power: ^5, ^-5, ^{-5}."""
        self.place += 1
        braces = self.take("{")
        negative, _ = self.ahead().text == "-", self.take("-", "+")
        exponent = self.digits()
        if (braces and not self.take("}")) or not exponent.is_integer() or exponent > 300:
            raise UnreadError
        return float(10.0 ** (-exponent if negative else exponent))

    def measured(self, value: float) -> Value:
        if self.take("°"):
            if self.ahead().text in ("C", "F", "celsius", "fahrenheit"):
                return Number(value, unit=self.unit()[0])
            return Number(value, unit="angle")
        if self.ahead().kind != "unit":
            return Number(value)
        dimension, factor = self.unit()
        if dimension == "clock":
            return Parts("half", (Number(value), Number(factor)))
        while self.ahead().text == "/" and self.ahead(1).kind == "unit":
            self.place += 1
            below, by = self.unit()
            dimension, factor = f"{dimension}/{below}", factor / by
        return Number(value, unit=dimension, factor=factor)

    def unit(self) -> tuple[str, float]:
        """The unit that comes next, with its power: m, cm^2, cm^{2}."""
        text = self.ahead().text
        if text not in UNITS and text.casefold() not in UNITS:
            raise UnreadError
        dimension, factor = UNITS.get(text) or UNITS[text.casefold()]
        self.place += 1
        if self.ahead().text != "^":
            return dimension, factor
        self.place += 1
        braces = self.take("{")
        power = self.digits()
        if (braces and not self.take("}")) or power not in (2, 3):
            raise UnreadError
        return f"{dimension}^{power:g}", factor**power
