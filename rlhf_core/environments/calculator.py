"""A calculator that reads arithmetic and nothing else: no names, no attributes, no calls but a few
functions, and bounds on the size of what it computes."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

LONGEST = 300  # characters of an expression
DEEPEST = 40  # levels of brackets
LARGEST = 10**30  # of any number on the way
LARGEST_POWER = 100  # of an exponent
DIGITS = 12  # significant digits of what is not exact

_SIGNS = {"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "^": "**", "\u00a0": " "}
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs, "min": min, "max": max, "round": round, "floor": math.floor, "ceil": math.ceil,
}  # fmt: skip

Number = Any  # a Fraction, or a float where the value is not exact


class NotArithmetic(ValueError):
    """The text is not an expression that this calculator computes; the message says why."""


def calculator(expression: str) -> str:
    """Computes arithmetic: numbers, + - * / // % **, brackets, sqrt, round, min, max."""
    return shown(compute(expression))


def compute(expression: str) -> Number:
    """The value of an expression, exact but for roots and fractional powers.

    Raises:
        NotArithmetic: it is something else, or too large.
    """
    text = expression.strip().removesuffix("=").strip()
    if not text or len(text) > LONGEST:
        raise NotArithmetic(f"the expression has {len(text)} characters, expected 1 to {LONGEST}")
    for sign, plain in _SIGNS.items():
        text = text.replace(sign, plain)
    text = text.replace("$", "")
    try:
        tree = ast.parse(_without_separators(text), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise NotArithmetic(f"{expression[:60]!r} is not an arithmetic expression") from None
    try:
        return _value(tree.body, 0)
    except ZeroDivisionError:
        raise NotArithmetic("division by zero") from None
    except (OverflowError, TypeError, ValueError) as error:
        if isinstance(error, NotArithmetic):
            raise
        raise NotArithmetic(f"{expression[:60]!r} cannot be computed ({error})") from None


def shown(value: Number) -> str:
    """A number as people write it: whole numbers without a point, else at most 12 digits."""
    if value == int(value):
        return str(int(value))
    return f"{float(value):.{DIGITS}g}"


def _without_separators(text: str) -> str:
    """1,234.5 as 1234.5: commas between groups of three digits, where no function is called."""
    if any(name in text for name in _FUNCTIONS):
        return text
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)


def _value(node: ast.expr, depth: int) -> Number:
    if depth > DEEPEST:
        raise NotArithmetic(f"the expression has more than {DEEPEST} levels")
    match node:
        case ast.Constant(value=bool()):
            raise NotArithmetic(f"{node.value!r} is not a number")
        case ast.Constant(value=int() | float() as number):
            return _bounded(Fraction(repr(number)))
        case ast.UnaryOp(op=ast.UAdd() | ast.USub()):
            inner = _value(node.operand, depth + 1)
            return -inner if isinstance(node.op, ast.USub) else inner
        case ast.BinOp(op=ast.Pow()):
            return _power(_value(node.left, depth + 1), _value(node.right, depth + 1))
        case ast.BinOp() if type(node.op) in _BINARY:
            left, right = _value(node.left, depth + 1), _value(node.right, depth + 1)
            return _bounded(_BINARY[type(node.op)](left, right))
        case ast.Call(func=ast.Name(id=name), keywords=[]):
            return _called(name, [_value(argument, depth + 1) for argument in node.args])
    raise NotArithmetic(
        f"{ast.unparse(node)[:60]!r} is not arithmetic; expected numbers with + - * / // % ** and "
        f"brackets, {', '.join(_FUNCTIONS)} and sqrt"
    )


def _called(name: str, values: list[Number]) -> Number:
    if name == "sqrt" and len(values) == 1:
        if values[0] < 0:
            raise NotArithmetic("the square root of a negative number")
        return _power(values[0], Fraction(1, 2))
    if name not in _FUNCTIONS or not values:
        known = ", ".join((*_FUNCTIONS, "sqrt"))
        raise NotArithmetic(f"there is no function {name[:30]} of {len(values)} numbers; {known}")
    if name == "round" and len(values) == 2:
        return _bounded(Fraction(round(values[0], _whole(values[1]))))
    return _bounded(_FUNCTIONS[name](*values))


def _power(base: Number, exponent: Number) -> Number:
    if abs(exponent) > LARGEST_POWER:
        raise NotArithmetic(f"an exponent of {shown(exponent)}, expected at most {LARGEST_POWER}")
    if base < 0 and exponent != int(exponent):
        raise NotArithmetic("a fractional power of a negative number")
    if abs(base) > 1 and abs(exponent) * math.log10(abs(base)) > math.log10(LARGEST) + 1:
        raise NotArithmetic(f"the result is beyond {LARGEST:.0e}")
    if exponent == int(exponent):
        return _bounded(base ** int(exponent))
    root = float(base) ** float(exponent)
    near = round(root)  # the root of a square is whole
    return _bounded(Fraction(near) if exponent == Fraction(1, 2) and near * near == base else root)


def _whole(value: Number) -> int:
    if value != int(value) or abs(value) > DIGITS:
        raise NotArithmetic(f"round to {shown(value)} digits, expected a whole number up to 12")
    return int(value)


def _bounded(value: Any) -> Number:
    if isinstance(value, int):
        value = Fraction(value)
    if abs(value) > LARGEST or (isinstance(value, Fraction) and value.denominator > LARGEST**2):
        raise NotArithmetic(f"the result is beyond {LARGEST:.0e}")
    return value
