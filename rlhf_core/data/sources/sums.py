"""Sums in words, in the manner of GSM8K (arXiv 2110.14168), made by rule: nothing to download.

`builtin:sums` has two subsets, over the same questions: `questions` (prompt, completion, answer),
and `calls`, conversations in which the tool `calculator` computes the answer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from rlhf_core.data.rows.row import RawRow
from rlhf_core.errors import DataError

VERSION = "1"
SUBSETS = ("questions", "calls")
COUNT = 4000
SEED = 2110

_NAMES = ("Ann", "Ben", "Clara", "David", "Eva", "Farid", "Grace", "Hugo", "Ines", "Jonas")
_THINGS = ("apples", "books", "clips", "eggs", "marbles", "pencils", "shells", "stamps", "tickets")

# A question and its sum; a to d are numbers. Differences and shares come out whole, see `_numbers`.
_SUMS = (
    ("{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?",
     "{a} + {b}"),
    ("{name} had {a} {things} and gave {b} of them away. How many are left?", "{a} - {b}"),
    ("{name} buys {b} boxes with {c} {things} in each. How many {things} is that?", "{b} * {c}"),
    ("{name} buys {b} boxes with {c} {things} in each, and has {d} {things} at home. How many "
     "{things} are there altogether?", "{b} * {c} + {d}"),
    ("{name} sold {e} {things} in April, and half as many in May. How many {things} did {name} "
     "sell in both months?", "{e} + {e} / 2"),
    ("{name} had {a} {things}, lost {b} of them and found {d} others. How many {things} does "
     "{name} have?", "{a} - {b} + {d}"),
    ("{name} shares {f} {things} equally among {c} friends. How many does each of them get?",
     "{f} / {c}"),
    ("One of the {things} costs {b} dollars. {name} pays for {c} of them with {g} dollars. How "
     "many dollars does {name} get back?", "{g} - {b} * {c}"),
)  # fmt: skip

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": (
            "Computes arithmetic: numbers, + - * / // % **, brackets, sqrt, round, min, max."
        ),
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}


def rows(subset: str | None) -> Iterator[RawRow]:
    """The rows of a subset.

    Raises:
        DataError: there is no such subset.
    """
    subset = subset or "questions"
    if subset not in SUBSETS:
        raise DataError(
            f"builtin:sums has no subset {subset!r}; subset is one of {', '.join(SUBSETS)}."
        )
    chance = random.Random(SEED)
    for number in range(1, COUNT + 1):
        question, expression, answer = _sum(chance)
        if subset == "questions":
            row = {"prompt": question, "completion": answer, "answer": answer}
        else:
            row = {"messages": _conversation(question, expression, answer), "tools": [TOOL]}
        yield RawRow(f"sums:{subset}", number, row)


def _sum(chance: random.Random) -> tuple[str, str, str]:
    """A question, the sum that answers it, and the answer."""
    text, form = chance.choice(_SUMS)
    numbers = _numbers(chance)
    words = {"name": chance.choice(_NAMES), "things": chance.choice(_THINGS)}
    a, b, c, d, e, f, g = (numbers[name] for name in "abcdefg")
    results = (a + b, a - b, b * c, b * c + d, e + e // 2, a - b + d, f // c, g - b * c)
    number = [sum_ for _, sum_ in _SUMS].index(form)
    return text.format(**numbers, **words), form.format(**numbers), str(results[number])


def _numbers(chance: random.Random) -> dict[str, int]:
    b, c = chance.randint(2, 40), chance.randint(2, 12)
    return {
        "a": b + chance.randint(1, 60),
        "b": b,
        "c": c,
        "d": chance.randint(2, 60),
        "e": 2 * chance.randint(2, 50),
        "f": c * chance.randint(2, 20),
        "g": b * c + chance.randint(1, 50),
    }


def _conversation(question: str, expression: str, answer: str) -> list[dict[str, Any]]:
    function = {"name": "calculator", "arguments": {"expression": expression}}
    return [
        {"role": "user", "content": question},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "call00000", "type": "function", "function": function}],
        },
        {"role": "tool", "content": answer, "name": "calculator", "tool_call_id": "call00000"},
        {"role": "assistant", "content": f"The answer is {answer}."},
    ]
