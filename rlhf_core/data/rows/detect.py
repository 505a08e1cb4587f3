"""Detects the format of a source's rows from their columns."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from rlhf_core.data.rows.labels import is_label
from rlhf_core.data.rows.row import SKIP_HINT, BadRow, RawRow, names
from rlhf_core.errors import DataError
from rlhf_core.jobs import DataSettings, Format, Purpose


def find_format(
    rows: Iterator[RawRow], settings: DataSettings, purpose: Purpose | None = None
) -> tuple[Iterator[RawRow], Format]:
    """All rows, and their format: as set, or that of the first readable row.

    Args:
        purpose: what the rows are for; see `detect_format`.

    Raises:
        DataError: there are no rows, or the columns match no format.
    """
    seen: list[RawRow] = []
    for raw in rows:
        seen.append(raw)
        if raw.dropped:
            continue
        if settings.format != "auto":
            return itertools.chain(seen, rows), settings.format
        try:
            return itertools.chain(seen, rows), detect_format(
                raw.columns(settings.columns), purpose
            )
        except BadRow as bad:
            readable = bad.reason in ("unknown_format", "missing_column", "not_an_object")
            if readable or settings.on_bad_row == "error":
                hint = "" if readable else f" {SKIP_HINT}"
                raise DataError(f"{raw.where()}: {bad.message}.{hint}") from None
    if seen:
        raise DataError(
            f"{settings.source}: none of its {len(seen):,} rows can be read; the last one "
            f"({seen[-1].where()}) is {_problem(seen[-1])}."
        )
    raise DataError(f"{settings.source} is empty: it has no rows; check the path and the file.")


def detect_format(row: dict[str, Any], purpose: Purpose | None = None) -> Format:
    """The format that matches a row's columns.

    Args:
        purpose: what the rows are for. A column `label` may also hold something else, such as a
            category; the row is unpaired if the value is a label, or if the purpose is unpaired.

    Raises:
        BadRow: the columns match no format.
    """
    has = row.keys()
    if {"chosen", "rejected"} <= has:
        transcript = isinstance(row["chosen"], str) and "\n\nHuman:" in row["chosen"]
        if "prompt" in has or not transcript:
            return "preference"
        return "hh"
    if "messages" in has:
        return "messages"
    if "conversations" in has:
        return "sharegpt"
    if "instruction" in has:
        return "alpaca"
    if {"prompt", "completion"} <= has:
        labelled = "label" in has and (purpose == "unpaired" or is_label(row["label"]))
        return "unpaired" if labelled else "prompt_completion"
    if "prompt" in has:
        return "prompt"
    if "text" in has:
        return "text"
    raise BadRow(
        "unknown_format",
        f"no format has the columns {names(row)}. The formats are alpaca (instruction, input, "
        "output), messages, sharegpt (conversations), prompt_completion (prompt, completion), hh "
        "(chosen, rejected), preference (prompt, chosen, rejected), unpaired (prompt, completion, "
        "label), prompt and text; rename columns with the setting columns, for example "
        '{"prompt": "question", "completion": "answer"}',
    )


def _problem(raw: RawRow) -> str:
    """Why a row cannot be read."""
    try:
        raw.columns({})
    except BadRow as bad:
        return bad.message
    return raw.dropped or "readable"
