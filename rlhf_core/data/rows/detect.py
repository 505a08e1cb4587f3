"""Detects the format of a source's rows from their columns."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from rlhf_core.data.dataset.carried import CARRIED
from rlhf_core.data.rows.advice import REPLIES, advice, whole_table
from rlhf_core.data.rows.columns import is_empty
from rlhf_core.data.rows.labels import is_label
from rlhf_core.data.rows.layout import (
    CALL_COLUMN,
    CONVERSATION,
    FORMAT_COLUMNS,
    LABEL,
    PROMPT,
    REPLY,
    check_columns,
    first_of,
)
from rlhf_core.data.rows.messages import is_transcript
from rlhf_core.data.rows.purposes import PURPOSES_OF, check_purpose
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
        format = settings.format
        if format == "auto":
            try:
                row = {
                    name: value
                    for name, value in raw.columns(settings.columns).items()
                    if name not in settings.ignore_columns
                }
                format = detect_format(row, purpose)
                if purpose is not None:
                    found = f"{raw.where()} has {names(row)}. {advice(row, purpose)}"
                    check_purpose(format, purpose, found)
            except BadRow as bad:
                readable = bad.reason in ("unknown_format", "missing_column", "not_an_object")
                if readable or settings.on_bad_row == "error":
                    hint = "" if readable else f" {SKIP_HINT}"
                    raise DataError(f"{raw.where()}: {bad.message}.{hint}") from None
                continue
        elif purpose is not None:
            check_purpose(format, purpose)
        further = CARRIED.get(purpose, ()) if purpose else sum(CARRIED.values(), ())
        check_columns(format, settings.columns, further)
        if settings.system and format == "text" and purpose in ("sft", "pretrain"):
            raise DataError(
                f"{settings.source}: system has no effect on plain text (format text), which has "
                "no turns; remove the setting, or give the rows another format."
            )
        return itertools.chain(seen, rows), format
    if seen:
        raise DataError(
            f"{settings.source}: none of its {len(seen):,} rows can be read; the last one "
            f"({seen[-1].where()}) is {_problem(seen[-1])}."
        )
    raise DataError(f"{settings.source} is empty: it has no rows; check the path and the file.")


_RENAMED = {
    "sft": 'columns: {"prompt": "question", "completion": "answer"}',
    "preference": 'columns: {"prompt": "question", "chosen": "good", "rejected": "bad"}',
    "unpaired": 'columns: {"prompt": "question", "completion": "answer", "label": "is_good"}',
    "prompts": 'columns: {"prompt": "question"}',
    "pretrain": 'columns: {"text": "content"}',
}


def detect_format(row: dict[str, Any], purpose: Purpose | None = None) -> Format:
    """The format that matches a row's columns.

    Args:
        purpose: what the rows are for. A column `label` may also hold something else, such as a
            category; the row is unpaired if the value is a label, or if the purpose is unpaired.

    Raises:
        BadRow: the columns match no format.
    """
    has = frozenset(row)
    if found := whole_table(row):
        raise BadRow("unknown_format", f"no format has the columns {names(row)}. {found}")
    if {"chosen", "rejected"} <= has:
        return _pair_format(row, has)
    conversation = first_of(CONVERSATION, has)
    label = first_of(LABEL, has)
    labelled = label and (purpose == "unpaired" or is_label(row[label]))
    if conversation:
        talk: Format = "sharegpt" if conversation == "conversations" else "messages"
        return "unpaired" if labelled else talk
    prompt, reply = first_of(PROMPT, has), first_of((*REPLY, CALL_COLUMN), has)
    if reply and ("instruction" in has or prompt):
        single: Format = "alpaca" if "instruction" in has else "prompt_completion"
        return "unpaired" if labelled else single
    if known := _known_but_unread(row):
        raise BadRow("unknown_format", known)
    if "instruction" in has:
        return "alpaca"
    if prompt == "input" and purpose != "prompts" and isinstance(row["input"], list):
        return "messages"
    if prompt:
        return "prompt"
    if "text" in has:
        reply = first_of(REPLIES, has) if purpose == "sft" else ""
        if reply and not is_empty(row[reply]):
            raise BadRow(
                "unknown_format",
                f"columns 'text' and {reply!r} may be a prompt and its reply; the row has "
                f'{names(row)}. Set columns: {{"prompt": "text", "completion": "{reply}"}}, or '
                f"ignore_columns: [{reply}] to train on the text alone",
            )
        return "text"
    able = [name for name, able in PURPOSES_OF.items() if purpose is None or purpose in able]
    columns = ", ".join(f"{name} {FORMAT_COLUMNS[name]}" for name in able)
    found = advice(row, purpose)
    example = (
        "" if found else f"; if one fits, rename columns, for example {_RENAMED[purpose or 'sft']}"
    )
    raise BadRow(
        "unknown_format",
        f"no format has the columns {names(row)}. {found}The formats"
        f"{f' for {purpose}' if purpose else ''} are {columns}{example}",
    )


def _known_but_unread(row: dict[str, Any]) -> str:
    """What to do with a known layout that no format reads; "" for other rows."""
    if {"prompt", "completions", "labels"} <= row.keys():
        return (
            "columns prompt, completions and labels are stepwise supervision, which is not "
            "supported: join the steps to one completion with one label, for format unpaired"
        )
    tree = row.get("prompt")
    if isinstance(tree, dict) and "replies" in tree:
        return (
            "column 'prompt' holds a tree of messages, as Open Assistant exports them: write each "
            "path from the first message to a reply as one row with the column messages "
            "({role, content}), or two replies to the same path as prompt, chosen and rejected"
        )
    if "instruction" in row and isinstance(row.get("instances"), list):
        return (
            "column 'instances' holds several inputs and outputs of one instruction, as in "
            "Self-Instruct: write each instance as one row with the columns instruction, input "
            "and output"
        )
    return ""


def _pair_format(row: dict[str, Any], has: frozenset[str]) -> Format:
    """The format of a row with the columns chosen and rejected.

    Raises:
        BadRow: they are texts, and nothing says what the prompt is.
    """
    if is_transcript(row["chosen"]) and is_transcript(row["rejected"]):
        return "hh"
    if "instruction" in has or first_of((*PROMPT, *CONVERSATION), has):
        return "preference"
    if not isinstance(row["chosen"], str) or not isinstance(row["rejected"], str):
        return "preference"
    if "\n\nHuman:" in row["chosen"]:
        return "hh"
    raise BadRow(
        "unknown_format",
        f"chosen and rejected are texts without a column 'prompt'; the row has {names(row)}. "
        f"{advice(row, 'preference')}If both texts begin with the prompt, set format: "
        "implicit_prompt, which reads the beginning that they share as the prompt",
    )


def _problem(raw: RawRow) -> str:
    """Why a row cannot be read."""
    try:
        raw.columns({})
    except BadRow as bad:
        return bad.message
    return raw.dropped or "readable"
