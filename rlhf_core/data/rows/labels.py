"""The label of a single reply: True for good, False for bad, written as `read_flag` reads it.

Other values are errors: a rating or a missing label could be read in more than one way.
"""

from __future__ import annotations

from typing import Any

from rlhf_core.data.rows.columns import read_flag
from rlhf_core.data.rows.row import BadRow, short


def is_label(value: Any) -> bool:
    """Whether a value can be read as a label."""
    return read_flag(value) is not None


def read_label(value: Any, name: str = "label") -> bool:
    """True for a good reply, False for a bad one.

    Raises:
        BadRow: the value is no label.
    """
    label = read_flag(value)
    if label is None:
        found = "null" if value is None else short(value)
        raise BadRow(
            "bad_label",
            f"column {name!r} holds {found}; expected true or false (or 1, 0): was the reply good? "
            "Convert ratings into one of the two; if the column means something else, set "
            f"ignore_columns: [{name}], or name another column in the setting columns",
        )
    return label
