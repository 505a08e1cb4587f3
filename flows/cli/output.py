"""All that the commands print, except the lines of a run (console.py) and of a chat.

Names, reasons and messages come from a store that many people write to: no control sequence in
them reaches the terminal.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import typer

from rlhf_core.system.printable import printable


def echo(text: object = "", err: bool = False) -> None:
    """Print a text and a newline."""
    typer.echo(printable(str(text)), err=err)


def print_json(lines: Iterable[Any]) -> None:
    """One JSON object per line."""
    for line in lines:
        echo(json.dumps(line, ensure_ascii=False))


def table(rows: list[list[str]]) -> None:
    """Rows below each other, heads first; each in one line."""
    shown = [[printable(" ".join(cell.split())) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in shown) for column in range(len(shown[0]))]
    for row in shown:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        echo("  ".join(cells).rstrip())


def as_objects(rows: list[list[str]]) -> list[dict[str, str]]:
    """The rows of a table, by their heads in small letters."""
    heads = [head.lower() for head in rows[0]]
    return [dict(zip(heads, row, strict=True)) for row in rows[1:]]
