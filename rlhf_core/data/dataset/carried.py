"""Columns that a data set carries beside the text: `answer` and `extra` of prompts, for rewards,
`margin` of preference pairs, for the reward model, and `curriculum`, for the order of an epoch.

A data set has them only if its settings `columns` and `curriculum` name them, or if the source is
reasoning-gym. So the columns depend on the settings alone, never on the rows.
"""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any

from rlhf_core.data.rows.row import BadRow, short, whole_text
from rlhf_core.data.sources.reasoning import is_reasoning
from rlhf_core.jobs import DataSettings, Purpose

CARRIED: dict[Purpose, tuple[str, ...]] = {
    "prompts": ("answer", "extra"),
    "preference": ("margin",),
}


def carried(settings: DataSettings, purpose: Purpose) -> tuple[str, ...]:
    """Which of these columns a data set with these settings has."""
    order = ("curriculum",) if settings.curriculum else ()
    if purpose == "prompts" and is_reasoning(settings.source):
        return CARRIED["prompts"] + order
    return tuple(name for name in CARRIED.get(purpose, ()) if name in settings.columns) + order


def carried_values(row: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """A row's values of these columns: `margin` and `curriculum` as numbers, the others as texts,
    "" for a missing value.

    Raises:
        BadRow: a value has a type that the column cannot hold.
    """
    write = {"answer": answer_text, "extra": extra_text, "margin": margin_number,
             "curriculum": curriculum_number}  # fmt: skip
    return {name: write[name](row.get(name)) for name in names}


def answer_text(value: Any) -> str:
    """A text or a number as text; "" for null and NaN, the empty cells of tables.

    Raises:
        BadRow: the value is neither, or not valid UTF-8.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float | Decimal):
        return str(value)
    if not isinstance(value, str):
        raise BadRow(
            "wrong_type",
            f"column 'answer' holds a {type(value).__name__}; expected a text or a number. Put "
            "other data for a reward into column 'extra'",
        )
    return whole_text(value, "column 'answer'")


def extra_text(value: Any) -> str:
    """A value as JSON text; "" for null. A text that is a JSON object or array stays unchanged.

    Raises:
        BadRow: the value cannot be written as JSON, or is not valid UTF-8.
    """
    if value is None or value == "":
        return ""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            json.loads(value)
            return whole_text(value, "column 'extra'")
        except (ValueError, RecursionError):
            pass  # a text like any other
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(
            "wrong_type", f"column 'extra' cannot be written as JSON ({error}); change the value"
        ) from None
    return whole_text(text, "column 'extra'")


def margin_number(value: Any) -> float:
    """A number of at least 0: how much better the chosen reply is, in any unit.

    Raises:
        BadRow: the value is no such number.
    """
    number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    if not number or not (math.isfinite(value) and value >= 0):
        raise BadRow(
            "wrong_type",
            f"column 'margin' holds {short(value)}; expected a number of at least 0: how much "
            "better the chosen reply is",
        )
    return float(value)


def curriculum_number(value: Any) -> float:
    """A number, also as a text (tables have no other), by which an epoch is ordered.

    Raises:
        BadRow: the value is no such number.
    """
    try:
        if isinstance(value, int | float | Decimal | str) and not isinstance(value, bool):
            number = float(value)
            if math.isfinite(number):
                return number
    except (ValueError, OverflowError):
        pass
    raise BadRow(
        "wrong_type",
        f"the column of the setting curriculum holds {short(value)}; expected a number by which "
        "the rows are ordered",
    )
