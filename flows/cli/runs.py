"""`rlhf runs`: the runs of a store, and their leaderboard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.listing import nothing, open_now, write_page
from flows.cli.options import Page, StoreUrl
from flows.cli.output import as_objects, echo, print_json, table

if TYPE_CHECKING:
    from rlhf_core.store import Store


def runs(
    store: StoreUrl = None,
    limit: Annotated[
        int, typer.Option("--limit", "-n", min=1, help="Number of runs to show.")
    ] = 20,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print JSON, one object per line: complete records, or "
            "the rows of the leaderboard.",
        ),
    ] = False,
    metrics: Annotated[
        bool, typer.Option("--metrics", help="Show a leaderboard: evaluation, time and cost.")
    ] = False,
    sort: Annotated[
        str | None,
        typer.Option(
            "--sort",
            metavar="COLUMN",
            help="Show the leaderboard of all runs, best first in this column: gold, kl, cost ...",
        ),
    ] = None,
    page: Page = None,
) -> None:
    """List the runs, newest first; with --metrics, --sort or --page as a leaderboard."""
    from flows.cli.lookup import read_runs

    opened = open_now(store)
    found = read_runs(opened)
    if metrics or sort or page:
        _leaderboard(opened, found, limit, sort, page, as_json)
    elif as_json:
        print_json(found[:limit])
    elif not found:
        echo(nothing("runs", opened))
    else:
        rows = [["RUN", "NAME", "OWNER", "STATE", "STARTED (UTC)", "TOOK", "STAGES", "METRICS",
                 "ERROR"]]  # fmt: skip
        table(rows + [_row(record) for record in found[:limit]])


def _row(record: dict[str, Any]) -> list[str]:
    """A run's line."""
    from flows.cli.diff import headline

    stages = record.get("stages") or {}
    reused = sum(bool(result.get("reused")) for result in stages.values())
    error = (record.get("error") or "").splitlines()
    started = str(record.get("started", ""))[:16].replace("T", " ")
    hacked = record.get("verdict") == "reward hacked"
    state = f"{record['state']}, reward hacked" if hacked else record["state"]
    if state == "running" and record.get("waiting"):
        state = f"waiting: {record['waiting'].partition(';')[0]}"
    name = str(record["name"])
    measured = headline((stages.get("evaluate") or {}).get("metrics") or {})
    return [
        str(record["id"]).removesuffix(f"-{name}"), name, str(record.get("author") or "-"), state,
        started, _took(record), f"{len(stages)}, {reused} reused" if reused else str(len(stages)),
        short_metrics(measured), error[0][:80] if error else "",
    ]  # fmt: skip


def _took(record: dict[str, Any]) -> str:
    """From a run's start to its end, or until now."""
    from datetime import UTC, datetime

    from tasks.events import seconds

    try:
        start = datetime.fromisoformat(record["started"])
        running = record["state"] == "running"
        end = datetime.now(UTC) if running else datetime.fromisoformat(record["ended"])
        return seconds((end - start).total_seconds())
    except (KeyError, TypeError, ValueError):  # it has died, or waits
        return "-"


def short_metrics(found: dict[str, float]) -> str:
    """The main metrics of an evaluation, for a table's cell."""
    shorter = {"win rate (reward)": "win (reward)", "win rate (gold)": "win (gold)",
               "reward accuracy": "accuracy"}  # fmt: skip
    return (
        ", ".join(f"{shorter.get(name, name)} {value:.3g}" for name, value in found.items()) or "-"
    )


def _leaderboard(
    opened: Store,
    records: list[dict[str, Any]],
    limit: int,
    sort: str | None,
    page: Path | None,
    as_json: bool,
) -> None:
    from tasks.reporting import markdown
    from tasks.reporting.past import leaderboard, past_run

    found = [past_run(opened, record) for record in (records if sort else records[:limit])]
    rows, note = leaderboard(found, sort)
    shown = rows[: limit + 1]
    if as_json:
        print_json(as_objects(shown))
    elif not found:
        echo(nothing("runs", opened))
        return
    else:
        table(shown)
        echo(f"\n{note}" if note else "")
    if page is not None:
        title = f"Runs in {opened.url}"
        write_page(page, title, f"# {title}\n\n{markdown.table(shown)}\n\n{note}\n")
