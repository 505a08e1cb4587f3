"""The commands that look at the store: `rlhf runs` and `rlhf artifacts ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

artifacts = typer.Typer(
    help="What the store holds: list, show, pull, verify.", no_args_is_help=True
)

StoreUrl = Annotated[
    str | None,
    typer.Option("--store", help="Artifact store: a folder, file:// or s3:// (or $RLHF_STORE)."),
]


def runs(
    store: StoreUrl = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many.")] = 20,
    as_json: Annotated[
        bool, typer.Option("--json", help="The whole records, one JSON object a line.")
    ] = False,
) -> None:
    """List the runs, newest first."""
    import json

    from flows.lookup import read_runs
    from rlhf_core.store import open_store

    opened = open_store(store)
    found = read_runs(opened)[:limit]
    if as_json:
        for record in found:
            typer.echo(json.dumps(record, ensure_ascii=False))
        return
    if not found:
        typer.echo(f"No runs in {opened.url}.")
        return
    rows = [["RUN", "NAME", "STATE", "STARTED (UTC)", "STAGES", "REUSED", "ERROR"]]
    for record in found:
        stages = record.get("stages") or {}
        reused = sum(bool(result.get("reused")) for result in stages.values())
        error = (record.get("error") or "").splitlines()
        started = str(record.get("started", ""))[:19].replace("T", " ")
        rows.append(
            [record["id"], record["name"], record["state"], started, str(len(stages)),
             str(reused), error[0][:80] if error else ""]
        )  # fmt: skip
    _table(rows)


@artifacts.command("list")
def list_artifacts(
    kind: Annotated[str | None, typer.Option("--kind", "-k", help="Only this kind.")] = None,
    store: StoreUrl = None,
) -> None:
    """List the artifacts, newest first."""
    from rlhf_core.store import open_store

    opened = open_store(store)
    found = opened.list(kind)
    if not found:
        there = sorted({artifact.kind for artifact in opened.list()})
        what = f"of kind {kind!r} " if kind else ""
        also = f" Kinds: {', '.join(there)}." if there else ""
        typer.echo(f"No artifacts {what}in {opened.url}.{also}")
        return
    rows = [["ARTIFACT", "CREATED (UTC)", "SIZE", "FILES", "WHAT"]]
    for artifact in found:
        created = artifact.created[:19].replace("T", " ")
        rows.append(
            [artifact.ref, created, _size(artifact.size), str(len(artifact.files)), _what(artifact)]
        )
    _table(rows)


@artifacts.command("show")
def show_artifact(
    ref: Annotated[str, typer.Argument(help="Digest, kind/start, stage or published name.")],
    store: StoreUrl = None,
) -> None:
    """Show one artifact: files, parents, and the job that made it."""
    import yaml

    from flows.lookup import find_any
    from rlhf_core.store import open_store

    artifact = find_any(open_store(store), ref)
    value = {
        "artifact": f"{artifact.kind}/{artifact.digest}",
        "created": artifact.created,
        "size": _size(artifact.size),
        "files": {entry.path: entry.size for entry in artifact.files},
        "parents": list(artifact.parents),
        **artifact.metadata,
    }
    typer.echo(yaml.safe_dump(value, sort_keys=False, allow_unicode=True).rstrip())


@artifacts.command("pull")
def pull_artifact(
    ref: Annotated[str, typer.Argument(help="Digest, kind/start, stage or published name.")],
    folder: Annotated[Path, typer.Argument(help="New or empty folder to put the files into.")],
    store: StoreUrl = None,
) -> None:
    """Copy an artifact's files into a folder, verified."""
    from flows.lookup import find_any
    from rlhf_core.store import open_store

    opened = open_store(store)
    artifact = find_any(opened, ref)
    typer.echo(f"{artifact.ref} -> {opened.fetch(artifact.digest, folder)}")


@artifacts.command("verify")
def verify_artifacts(
    refs: Annotated[list[str] | None, typer.Argument(help="Digests; none: all.")] = None,
    store: StoreUrl = None,
) -> None:
    """Read every byte again and compare it with its manifest."""
    from rlhf_core.store import open_store

    opened = open_store(store)
    chosen = [opened.get(ref) for ref in refs] if refs else opened.list()
    bad = 0
    for artifact in chosen:
        problems = opened.verify(artifact.digest)
        bad += bool(problems)
        typer.echo(f"{artifact.ref:<30} {'damaged' if problems else 'ok'}")
        for problem in problems:
            typer.echo(f"  {problem}", err=True)
    typer.echo(f"{len(chosen) - bad} of {len(chosen)} whole.")
    if bad:
        raise typer.Exit(1)


# --------------------------------------------------------------------------- tables


def _table(rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo("  ".join(cells).rstrip())


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def _what(artifact: Any) -> str:
    data = artifact.metadata
    details = data.get("name") or data.get("job", {}).get("purpose") or ""
    return f"{data.get('algorithm', '')} {details}".strip()
