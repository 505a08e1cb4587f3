"""The commands that read the store: `rlhf runs` and `rlhf artifacts ...` (gc is in gc.py)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.options import Page, StoreUrl
from flows.cli.output import echo, table

if TYPE_CHECKING:
    from rlhf_core.store import Artifact, Store

artifacts = typer.Typer(
    help="Artifacts in the store: list, show, tree, pull, verify, gc.", no_args_is_help=True
)


def runs(
    store: StoreUrl = None,
    limit: Annotated[
        int, typer.Option("--limit", "-n", min=1, help="Number of runs to show.")
    ] = 20,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print complete records, one JSON object per line.")
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
    import json

    from flows.cli.lookup import read_runs
    from rlhf_core.errors import ConfigError

    if as_json and (metrics or sort or page):
        raise ConfigError(
            "--json prints whole records; leave out --sort, --metrics and --page, which belong to "
            "the leaderboard."
        )
    opened = open_now(store)
    found = read_runs(opened)
    if metrics or sort or page:
        _leaderboard(opened, found, limit, sort, page)
        return
    found = found[:limit]
    if as_json:
        for record in found:
            echo(json.dumps(record, ensure_ascii=False))
        return
    if not found:
        echo(f"No runs in {opened.url}.")
        return
    rows = [["RUN", "NAME", "STATE", "STARTED (UTC)", "STAGES", "REUSED", "ERROR"]]
    for record in found:
        stages = record.get("stages") or {}
        reused = sum(bool(result.get("reused")) for result in stages.values())
        error = (record.get("error") or "").splitlines()
        started = str(record.get("started", ""))[:19].replace("T", " ")
        hacked = record.get("verdict") == "reward hacked"
        state = f"{record['state']}, reward hacked" if hacked else record["state"]
        rows.append(
            [record["id"], record["name"], state, started, str(len(stages)),
             str(reused), error[0][:80] if error else ""]
        )  # fmt: skip
    table(rows)


def _leaderboard(
    opened: Store, records: list[dict[str, Any]], limit: int, sort: str | None, page: Path | None
) -> None:
    from tasks.reporting import markdown
    from tasks.reporting.past import leaderboard, past_run

    found = [past_run(opened, record) for record in (records if sort else records[:limit])]
    rows, note = leaderboard(found, sort)
    shown = rows[: limit + 1]
    if not found:
        echo(f"No runs in {opened.url}.")
        return
    table(shown)
    if note:
        echo(f"\n{note}")
    if page is not None:
        title = f"Runs in {opened.url}"
        write_page(page, title, f"# {title}\n\n{markdown.table(shown)}\n\n{note}\n")


@artifacts.command("list")
def list_artifacts(
    kind: Annotated[str | None, typer.Option("--kind", "-k", help="List only this kind.")] = None,
    store: StoreUrl = None,
) -> None:
    """List the artifacts, newest first."""
    opened = open_now(store)
    found = opened.list(kind)
    if not found:
        there = sorted({artifact.kind for artifact in opened.list()})
        what = f"of kind {kind!r} " if kind else ""
        also = f" Kinds: {', '.join(there)}." if there else ""
        echo(f"No artifacts {what}in {opened.url}.{also}")
        return
    rows = [["ARTIFACT", "CREATED (UTC)", "SIZE", "FILES", "WHAT"]]
    for artifact in found:
        created = artifact.created[:19].replace("T", " ")
        rows.append(
            [
                artifact.ref,
                created,
                size_text(artifact.size),
                str(len(artifact.files)),
                _what(artifact),
            ]
        )
    table(rows)


@artifacts.command("show")
def show_artifact(
    ref: Annotated[str, typer.Argument(help="Digest, kind/start, stage or published name.")],
    store: StoreUrl = None,
) -> None:
    """Show one artifact: files, parents, and the job that made it."""
    import yaml

    from flows.cli.lookup import find_any

    artifact = find_any(open_now(store), ref)
    value = {
        "artifact": f"{artifact.kind}/{artifact.digest}",
        "created": artifact.created,
        "size": size_text(artifact.size),
        "files": {entry.path: entry.size for entry in artifact.files},
        "parents": list(artifact.parents),
        **artifact.metadata,
    }
    echo(yaml.safe_dump(value, sort_keys=False, allow_unicode=True).rstrip())


@artifacts.command("tree")
def show_tree(
    ref: Annotated[str, typer.Argument(help="Digest, kind/start, stage or published name.")],
    store: StoreUrl = None,
) -> None:
    """Show an artifact's lineage: its parents, their parents, and so on to the base model."""
    from flows.cli.lookup import find_any

    opened = open_now(store)
    artifact = find_any(opened, ref)
    for line in tree_lines(artifact.digest, opened.lineage(artifact.digest)):
        echo(line)


def tree_lines(digest: str, known: dict[str, Artifact | None]) -> list[str]:
    """One line per artifact, its parents indented below it. Parents are shown once."""
    shown: set[str] = set()
    lines: list[str] = []

    def walk(digest: str, first: str, rest: str) -> None:
        artifact = known.get(digest)
        if artifact is None:
            lines.append(f"{first}{digest[:12]}  (missing or damaged)")
            return
        about = f"{_what(artifact)}  {size_text(artifact.size)}".strip()
        parents = list(dict.fromkeys(artifact.parents))
        if digest in shown:
            lines.append(f"{first}{artifact.ref}  {_what(artifact)}".rstrip() + "  (see above)")
            return
        shown.add(digest)
        lines.append(f"{first}{artifact.ref}  {about}  {artifact.created[:10]}")
        for number, parent in enumerate(parents, 1):
            last = number == len(parents)
            walk(parent, rest + ("└── " if last else "├── "), rest + ("    " if last else "│   "))

    walk(digest, "", "")
    return lines


@artifacts.command("pull")
def pull_artifact(
    ref: Annotated[str, typer.Argument(help="Digest, kind/start, stage or published name.")],
    folder: Annotated[Path, typer.Argument(help="New or empty folder for the files.")],
    store: StoreUrl = None,
) -> None:
    """Copy an artifact's files to a folder, and verify them."""
    from flows.cli.lookup import find_any

    opened = open_now(store)
    artifact = find_any(opened, ref)
    echo(f"{artifact.ref} -> {opened.fetch(artifact.digest, folder)}")


@artifacts.command("verify")
def verify_artifacts(
    refs: Annotated[list[str] | None, typer.Argument(help="Digests; default: all.")] = None,
    store: StoreUrl = None,
) -> None:
    """Read all files and compare them with the checksums in their manifests."""
    opened = open_now(store)
    chosen = [opened.get(ref) for ref in refs] if refs else opened.list()
    bad = 0
    for artifact in chosen:
        problems = opened.verify(artifact.digest)
        bad += bool(problems)
        echo(f"{artifact.ref:<30} {'damaged' if problems else 'ok'}")
        for problem in problems:
            echo(f"  {problem}", err=True)
    echo(f"{len(chosen) - bad} of {len(chosen)} intact.")
    if bad:
        raise typer.Exit(1)


# --------------------------------------------------------------------------- shared


def open_now(url: str | None) -> Store:
    """Open a store and check that it answers. Commands do not retry for as long as training does.

    Raises:
        StoreUnavailable: no answer within half a minute.
    """
    from rlhf_core.store import open_store

    opened = open_store(url)
    opened.ping()
    return opened


def write_page(path: Path, title: str, text: str) -> None:
    """Write Markdown as a page.

    Raises:
        ConfigError: the file cannot be written.
    """
    from rlhf_core.errors import ConfigError
    from tasks.reporting.markdown import page

    try:
        path.write_text(page(title, text), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"Cannot write {path}: {error.strerror}; choose another --page."
        ) from error
    echo(f"page: {path}")


def size_text(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def _what(artifact: Any) -> str:
    data = artifact.metadata
    details = data.get("name") or data.get("job", {}).get("purpose") or ""
    return " ".join(f"{data.get('algorithm', '')} {details}".split())
