"""`rlhf compare`: runs beside each other."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.cli.completion import complete_run
from flows.cli.listing import open_now, write_page
from flows.cli.options import AsJson, Page, StoreUrl
from flows.cli.output import as_objects, echo, print_json, table

LONGEST_CELL = 48  # characters, in a terminal


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN",
            help="Two runs or more: ids or their first characters, or `last`; see `rlhf runs`.",
            autocompletion=complete_run,
        ),
    ],
    page: Page = None,
    as_json: AsJson = False,
    store: StoreUrl = None,
) -> None:
    """Compare runs: settings that differ, evaluation with intervals, time and cost.

    The page also has the curves over each other and the replies to the same prompts.
    """
    from flows.cli.remote import find_run
    from rlhf_core.errors import ConfigError
    from tasks.reporting import comparison
    from tasks.reporting.past import past_run

    opened = open_now(store)
    records = {record["id"]: record for record in (find_run(opened, name) for name in runs)}
    if len(records) < 2:
        raise ConfigError(
            f"Found one run, {', '.join(records)}; expected two or more, such as `rlhf compare "
            "20261124-1151 last`."
        )
    found = [past_run(opened, record) for record in records.values()]
    sections = comparison.compare(opened, found)
    if as_json:
        print_json({"title": section.title, "rows": as_objects(section.rows), "note": section.note}
                   for section in sections)  # fmt: skip
    for section in [] if as_json else sections:
        echo(f"{section.title}\n")
        table([[_short(text) for text in row] for row in section.rows])
        echo(f"{section.note}\n" if section.note else "")
    if page is not None:
        write_page(page, "Comparison of runs", comparison.page_of(opened, found))


def _short(text: str) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= LONGEST_CELL else f"{plain[: LONGEST_CELL - 1]}…"
