"""`rlhf artifacts gc`: what is kept, and deleting the rest."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.listing import open_now, size_text, table
from flows.cli.options import StoreUrl

if TYPE_CHECKING:
    from rlhf_core.store import Store
    from rlhf_core.store.collect import Garbage

KEPT_ARCHIVED = 3
FINISHED = ("completed", "failed", "cancelled", "died")
SHOWN = 30
_DIGEST = re.compile(r"\b[0-9a-f]{64}\b")
_SOURCE = re.compile(r"artifact:(?:[a-z0-9._-]+/)?([0-9a-f]{6,64})\b")


def gc(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete; else only show.")] = False,
    keep_days: Annotated[
        float, typer.Option(min=0, help="Runs and artifacts of so many days stay.")
    ] = 30,
    grace_hours: Annotated[
        float,
        typer.Option(min=0, help="Nothing younger goes; longer than any upload takes."),
    ] = 24,
    keep_archived: Annotated[
        int, typer.Option(min=0, help="So many archived versions of each model stay.")
    ] = KEPT_ARCHIVED,
    store: StoreUrl = None,
) -> None:
    """Delete what nothing needs any more: first look, then add --yes.

    Kept are: each model's champion, candidates and last archived versions; what a run that was
    active within --keep-days, is running or waits for an approval has used or made; every artifact
    and checkpoint of those days; and all that those were made from. The rest goes: artifacts with
    the files that no other one shares, stage results, checkpoints, and what killed writers left.
    Runs, their records and models may be made and published meanwhile. Records of runs and the
    history of models are not deleted.
    """
    from rlhf_core.store.collect import Limits

    opened = open_now(store)
    grace = grace_hours * 3600
    limits = Limits(keep=max(keep_days * 86_400, grace), grace=grace)

    def roots() -> set[str]:
        return set(digests_in_use(opened, timedelta(seconds=limits.keep), keep_archived))

    found = (opened.collect if yes else opened.find_garbage)(roots, limits)
    _show(found, yes)


def digests_in_use(store: Store, young: timedelta, archived: int) -> Iterator[str]:
    """Digests of models (so many archived versions of each), and those that runs name."""
    from flows.cli.lookup import read_runs
    from rlhf_core.store.registry import kept_digests

    yield from kept_digests(store, archived)
    for prefix in ("retrain/", "watched/"):
        for path in store.list_records(prefix):
            yield from _digests(store, store.read_record(path) or {})
    now = datetime.now(UTC)
    for run in read_runs(store):
        # One that did not end counts however long ago its last stage was: an approval takes time.
        if run.get("state") not in FINISHED or now - _last_active(run) <= young:
            yield from _digests(store, run)


def _digests(store: Store, record: dict[str, Any]) -> Iterator[str]:
    """Everything in a record that looks like a digest: too much is kept rather than too little."""
    from rlhf_core.errors import RLHFError

    text = json.dumps(record)
    yield from _DIGEST.findall(text)
    for start in _SOURCE.findall(text):
        try:
            yield store.get(start).digest
        except RLHFError:  # gone, or never was
            continue


def _last_active(run: dict[str, Any]) -> datetime:
    """When the run was last heard of; a record that does not say so counts as new."""
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
        typer.echo(f"and {len(newest) - SHOWN} more")
    for note in found.notes:
        typer.echo(f"Note: {note}.", err=True)
    files = sum(entry.size for entry in found.blobs)
    checkpoints = sum(entry.size for entry in found.checkpoints)
    scopes = {entry.key.split("/")[1] for entry in found.checkpoints}
    did = "Deleted" if deleted else "Would delete"
    typer.echo(
        f"{did} {len(found.artifacts)} artifacts, {len(found.blobs)} files ({size_text(files)}), "
        f"checkpoints of {len(scopes)} stages ({size_text(checkpoints)}) and {len(found.others)} "
        f"other records: {size_text(found.size)}. {found.kept} artifacts are kept."
    )
    if found.uploads:
        typer.echo(f"Ended {found.uploads} uploads that killed writers had left.")
    if not deleted and found.entries:
        typer.echo("Nothing was deleted; --yes does it.")
