"""`rlhf artifacts gc`: deletes artifacts that nothing refers to."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.listing import open_now, size_text
from flows.cli.options import AsJson, StoreUrl
from flows.cli.output import echo, print_json, table

if TYPE_CHECKING:
    from rlhf_core.store import Store
    from rlhf_core.store.collect import Garbage

KEPT_ARCHIVED = 3
FINISHED = ("completed", "failed", "cancelled", "died")
SHOWN = 30
_DIGEST = re.compile(r"\b[0-9a-f]{64}\b")
_SOURCE = re.compile(r"artifact:(?:[a-z0-9._-]+/)?([0-9a-f]{6,64})\b")


def gc(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete; otherwise only list.")] = False,
    keep_days: Annotated[
        float, typer.Option(min=0, help="Keep runs and artifacts of the last days.")
    ] = 30,
    grace_hours: Annotated[
        float,
        typer.Option(min=0, help="Keep everything younger; must be longer than an upload."),
    ] = 24,
    keep_archived: Annotated[
        int, typer.Option(min=0, help="Archived versions of each model to keep.")
    ] = KEPT_ARCHIVED,
    as_json: AsJson = False,
    store: StoreUrl = None,
) -> None:
    """Delete artifacts that nothing refers to. Lists them first; --yes deletes them.

    It keeps each model's champion, candidates and newest archived versions; the inputs and results
    of runs that were active within --keep-days, are running or wait for an approval; all artifacts
    and checkpoints of those days; and the lineage of all of these. It deletes the other artifacts
    with files that no kept artifact shares, stage results, checkpoints, and leftovers of writers
    that were killed. Other runs can train and publish meanwhile. Records of runs and the history of
    models are never deleted.
    """
    from rlhf_core.store.collect import Limits

    opened = open_now(store)
    grace = grace_hours * 3600
    limits = Limits(keep=max(keep_days * 86_400, grace), grace=grace)

    def roots() -> set[str]:
        return set(digests_in_use(opened, timedelta(seconds=limits.keep), keep_archived))

    found = (opened.collect if yes else opened.find_garbage)(roots, limits)
    if as_json:
        print_json([{"deleted": yes, "artifacts": [ref for ref, _ in found.artifacts],
                     "bytes": found.size, "kept": found.kept, "notes": found.notes}])  # fmt: skip
    else:
        _show(found, yes)


def digests_in_use(store: Store, young: timedelta, archived: int) -> Iterator[str]:
    """Digests of models, and those in the records of runs.

    Args:
        young: runs that were active within it are kept.
        archived: archived versions of each model to keep.
    """
    from flows.cli.lookup import run_records
    from rlhf_core.store.registry import kept_digests

    yield from kept_digests(store, archived)
    for prefix in ("retrain/", "watched/"):
        for path in store.list_records(prefix):
            yield from digests_of(store, store.read_record(path) or {})
    now = datetime.now(UTC)
    for run in run_records(store).values():
        # A run that has not ended counts whatever its age: it may wait for an approval.
        if run.get("state") not in FINISHED or now - _last_active(run) <= young:
            yield from digests_of(store, run)


def digests_of(store: Store, record: dict[str, Any]) -> Iterator[str]:
    """Everything in a record that looks like a digest. Keeping too much does no harm."""
    from rlhf_core.errors import RLHFError

    text = json.dumps(record)
    yield from _DIGEST.findall(text)
    for start in _SOURCE.findall(text):
        try:
            yield store.get(start).digest
        except RLHFError:  # no such artifact (any more)
            continue


def _last_active(run: dict[str, Any]) -> datetime:
    """Time of the run's last update; now, if the record has none."""
    for name in ("updated", "ended", "started"):
        try:
            found = datetime.fromisoformat(run[name])
        except (KeyError, TypeError, ValueError):
            continue
        return found if found.tzinfo else found.replace(tzinfo=UTC)
    return datetime.now(UTC)


def _show(found: Garbage, deleted: bool) -> None:
    rows = [["ARTIFACT", "CREATED (UTC)"]]
    newest = sorted(found.artifacts, key=lambda item: item[1], reverse=True)
    rows += [[ref, created[:19].replace("T", " ")] for ref, created in newest[:SHOWN]]
    if found.artifacts:
        table(rows)
    if len(newest) > SHOWN:
        echo(f"and {len(newest) - SHOWN} more")
    for note in found.notes:
        echo(f"Note: {note}.", err=True)
    files = sum(entry.size for entry in found.blobs)
    checkpoints = sum(entry.size for entry in found.checkpoints)
    scopes = {entry.key.split("/")[1] for entry in found.checkpoints}
    did = "Deleted" if deleted else "Would delete"
    echo(
        f"{did} {len(found.artifacts)} artifacts, {len(found.blobs)} files ({size_text(files)}), "
        f"checkpoints of {len(scopes)} stages ({size_text(checkpoints)}) and {len(found.others)} "
        f"other records: {size_text(found.size)}. {found.kept} artifacts are kept."
    )
    if found.uploads:
        echo(f"Aborted {found.uploads} uploads of writers that were killed.")
    if not deleted and found.entries:
        echo("Nothing was deleted; add --yes to delete.")
