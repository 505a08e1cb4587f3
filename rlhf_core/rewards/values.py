"""Reads a span of tokens as a value: a number, or a structure of numbers.

What is not written down here or in numbers.py is not read: a sum, a product, a root, a power, a
factorial, a name. So a reply that repeats the question, such as 2 + 3, is not taken for its answer.
"""

from __future__ import annotations

from rlhf_core.rewards.numbers import Number, NumberReader, Parts, UnreadError, Value
from rlhf_core.rewards.spans import Token

_MIRRORED = {"<": ">", ">": "<", "≤": "≥", "≥": "≤", "≠": "≠"}


def read(span: list[Token]) -> Value | None:
    """The value of a span; None if it cannot be read in whole."""
    reader = _Reader(span)
    try:
        value = reader.relation()
    except (UnreadError, OverflowError, RecursionError):
        return None
    return value if reader.place == len(span) else None


class _Reader(NumberReader):
    """A recursive descent over tokens, its part for structures."""

    def relation(self) -> Value:
        """A union, or x > 5, or 0 < x <= 5, which is an interval."""
        sides: list[Value | None] = []
        signs: list[str] = []
        while True:
            after = self.ahead(1).text
            # m is also a unit's name
            if len(self.ahead().text) == 1 and self.ahead().text.isalpha() and (
                after in _MIRRORED or signs
            ) and after not in ("^", "("):  # fmt: skip
                self.place += 1
                sides.append(None)
            elif self.ahead().text in _MIRRORED and not sides:
                sides.append(None)
            else:
                sides.append(self.union())
            if self.ahead().text not in _MIRRORED:
                break
            signs.append(self.ahead().text)
            self.place += 1
        match sides:
            case [Number() | Parts() as value]:
                return value
            case [None, Number() as value]:
                return Parts(signs[0], (value,))
            case [Number() as value, None]:
                return Parts(_MIRRORED[signs[0]], (value,))
            case [Number() as low, None, Number() as high] if "≠" not in signs:
                if signs[0] in ">≥" and signs[1] in ">≥":
                    low, high, signs = high, low, [_MIRRORED[s] for s in reversed(signs)]
                if signs[0] in "<≤" and signs[1] in "<≤":
                    ends = "[" if signs[0] == "≤" else "(", "]" if signs[1] == "≤" else ")"
                    return Parts("".join(ends), (low, high))
        raise UnreadError

    def union(self) -> Value:
        items = [self.listed(",")]
        while self.take("∪"):
            items.append(self.listed(","))
        return items[0] if len(items) == 1 else Parts("∪", tuple(items))

    def listed(self, kind: str) -> Value:
        """Items with separators between them; one item is itself."""
        items = [self.item()]
        while self.take(",", ";") or self.ahead().kind == "join":
            if self.ahead().kind == "join":  # 2, 3, and 5
                self.place += 1
            items.append(self.item())
        return items[0] if len(items) == 1 else Parts(kind, tuple(items))

    def item(self) -> Value:
        opener = self.ahead()
        if opener.kind == "open":
            start = self.place
            try:
                value = self.number()
                if isinstance(value, Number):
                    return value
                self.place = start + 1
            except UnreadError:
                self.place = start + 1
            return self.bracketed(opener.text)
        first = self.number()
        if isinstance(first, Parts):  # 3 pm
            return _clock([first])
        if self.ahead().text in (":", "±", "–") or (
            self.ahead().text == "-" and not self.ahead().spaced
        ):
            return self.joined(first)
        return first

    def bracketed(self, opener: str) -> Value:
        if opener == "⟦":
            rows = [self.row()]
            while self.take("⏎"):
                if self.ahead().text != "⟧":
                    rows.append(self.row())
            return self.closed(Parts("⟦⟧", tuple(rows)), "⟧")
        inside = self.listed(",")
        closer = self.ahead().text
        if opener == "{" and closer == "}" and isinstance(inside, Number):
            return self.closed(inside, "}")
        alike = {"{": "}", "⦃": "⦄", "(": ")]", "[": ")]"}[opener]
        if not closer or closer not in alike:
            raise UnreadError
        kind = {"⦃": "{"}.get(opener, opener) + {"⦄": "}"}.get(closer, closer)
        bare = isinstance(inside, Parts) and inside.kind == ","
        items = inside.items if bare and isinstance(inside, Parts) else (inside,)
        return self.closed(Parts(kind, items), closer)

    def row(self) -> Value:
        cells = [self.item()]
        while self.take("&"):
            cells.append(self.item())
        return Parts("row", tuple(cells))

    def joined(self, first: Value) -> Value:
        """12:30, 3:4:5, 5 ± 1, 3-5, 2024-01-05."""
        kind, items = self.ahead().text, [first]
        while self.ahead().text == kind and not (kind == "-" and self.ahead().spaced):
            self.place += 1
            items.append(self.number())
        if kind == ":":
            return _clock(items)
        if kind == "±" and len(items) != 2:
            raise UnreadError
        return Parts("–" if kind == "-" else kind, tuple(items))


def _clock(items: list[Value]) -> Value:
    """A time or a ratio. With am or pm it has the kind "clock" and 24 hours; see `measured`."""
    numbers: list[Number] = []
    half: float | None = None
    for place, item in enumerate(items):
        if isinstance(item, Parts):  # the last number had am or pm behind it
            if item.kind != "half" or place != len(items) - 1:
                raise UnreadError
            item, last = item.items
            assert isinstance(item, Number) and isinstance(last, Number)
            half = last.value
        if item.percent or item.unit:
            raise UnreadError
        numbers.append(Number(item.value))
    if half is None:
        return Parts(":", tuple(numbers))
    hour, minutes = numbers[0].value, numbers[1:] or [Number(0.0)]
    if not 1 <= hour <= 12:
        raise UnreadError
    return Parts("clock", (Number(hour % 12 + half), *minutes))
