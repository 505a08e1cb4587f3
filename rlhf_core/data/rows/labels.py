"""The label of a single reply: True for good, False for bad.

    true                 false               JSON and Parquet
    1                    0                   numbers, 1.0 and 0.0 too, as tables with gaps hold them
    "true", "1"          "false", "0"        texts in any case, as in .csv files

Other values are errors: a rating or a missing label could be read in more than one way.
"""

from __future__ import annotations

from typing import Any

from rlhf_core.data.rows.row import BadRow, short

_TEXTS = {"true": True, "1": True, "false": False, "0": False}


def is_label(value: Any) -> bool:
    """Whether a value can be read as a label."""
    if isinstance(value, str):
        return value.strip().lower() in _TEXTS
    return isinstance(value, (bool, int, float)) and value in (0, 1)


def read_label(value: Any, name: str = "label") -> bool:
    """True for a good reply, False for a bad one.

    Raises:
        BadRow: the value is no label.
    """
    if not is_label(value):
        found = "null" if value is None else short(value)
        raise BadRow(
            "bad_label",
            f"column {name!r} holds {found}; expected true or false (or 1, 0): was the reply good? "
            "Convert ratings into one of the two; if the column means something else, set "
            f"ignore_columns: [{name}], or name another column in the setting columns",
        )
    return _TEXTS[value.strip().lower()] if isinstance(value, str) else bool(value)
