"""Which format the rows of a source have, told by their columns."""

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
    """The rows unchanged, and their format: as set, or that of the first row that can be read.

    Raises:
        DataError: there is no row, or its columns belong to no format.
    """
    looked: list[RawRow] = []
    for raw in rows:
        looked.append(raw)
        if raw.dropped:
            continue
        if settings.format != "auto":
            return itertools.chain(looked, rows), settings.format
        try:
            return itertools.chain(looked, rows), detect_format(
                raw.columns(settings.columns), purpose
            )
        except BadRow as bad:
            readable = bad.reason in ("unknown_format", "missing_column", "not_an_object")
            if readable or settings.on_bad_row == "error":
                hint = "" if readable else f" {SKIP_HINT}"
                raise DataError(f"{raw.where()}: {bad.message}.{hint}") from None
    if looked:
        raise DataError(
            f"{settings.source}: none of its {len(looked):,} rows can be read; the last one "
            f"({looked[-1].where()}) is {_problem(looked[-1])}."
        )
    raise DataError(f"{settings.source} is empty: it has no rows; check the path and the file.")


def detect_format(row: dict[str, Any], purpose: Purpose | None = None) -> Format:
    """The format that a row's columns belong to.

    Args:
        purpose: what the rows are for. A column `label` may be anything, a category say; it makes
            a row unpaired when it holds such a label, or when unpaired rows are wanted.

    Raises:
        BadRow: none of the formats.
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
        f"no format has the columns {names(row)}. Known are alpaca (instruction, input, output), "
        "messages, sharegpt (conversations), prompt_completion (prompt, completion), hh (chosen, "
        "rejected), preference (prompt, chosen, rejected), unpaired (prompt, completion, label), "
        "prompt and text; rename columns with "
        'the setting columns, for example {"prompt": "question", "completion": "answer"}',
    )


def _problem(raw: RawRow) -> str:
    try:
        raw.columns({})
    except BadRow as bad:
        return bad.message
    return raw.dropped or "readable"
