"""The commands `rlhf artifacts ...` (gc is in gc.py), and what other lists share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.options import AsJson, StoreUrl
from flows.cli.output import echo, print_json, table

if TYPE_CHECKING:
    from rlhf_core.store import Artifact, Store

artifacts = typer.Typer(
    help="Artifacts in the store: list, show, tree, pull, verify, gc, repair, delete.",
    no_args_is_help=True,
)


@artifacts.command("list")
def list_artifacts(
    kind: Annotated[str | None, typer.Option("--kind", "-k", help="List only this kind.")] = None,
    as_json: AsJson = False,
    store: StoreUrl = None,
) -> None:
    """List the artifacts, newest first."""
    opened = open_now(store)
    found = opened.list(kind)
    if as_json:
        print_json({"artifact": a.ref, "digest": a.digest, "created": a.created, "size": a.size,
                    "files": len(a.files), "what": _what(a)} for a in found)  # fmt: skip
        return
    if not found:
        there = sorted({artifact.kind for artifact in opened.list()})
        what = f"artifacts of kind {kind!r}" if kind else "artifacts"
        also = f" Kinds: {', '.join(there)}." if there else ""
        echo(nothing(what, opened) + also)
        return
    rows = [["ARTIFACT", "CREATED (UTC)", "SIZE", "FILES", "WHAT"]]
    for artifact in found:
        created = artifact.created[:19].replace("T", " ")
        size, count = size_text(artifact.size), str(len(artifact.files))
        rows.append([artifact.ref, created, size, count, _what(artifact)])
    table(rows)


@artifacts.command("show")
def show_artifact(
    ref: Annotated[str, typer.Argument(help="Digest, kind/start, stage or published name.")],
    as_json: AsJson = False,
    store: StoreUrl = None,
) -> None:
    """Show one artifact: files, parents, and the job that made it."""
    import yaml

    from flows.cli.lookup import find_any

    artifact = find_any(open_now(store), ref)
    value = {
        "artifact": f"{artifact.kind}/{artifact.digest}",
        "created": artifact.created,
        "size": artifact.size if as_json else size_text(artifact.size),
        "files": {entry.path: entry.size for entry in artifact.files},
        "parents": list(artifact.parents),
        **artifact.metadata,
    }
    if as_json:
        print_json([value])
    else:
        echo(yaml.safe_dump(value, sort_keys=False, allow_unicode=True).rstrip())


@artifacts.command("tree")
def show_tree(
    ref: Annotated[str, typer.Argument(help="Digest, kind/start, stage or published name.")],
    as_json: AsJson = False,
    store: StoreUrl = None,
) -> None:
    """Show an artifact's lineage: its parents, their parents, and so on to the base model."""
    from flows.cli.lookup import find_any

    opened = open_now(store)
    artifact = find_any(opened, ref)
    known = opened.lineage(artifact.digest)
    if as_json:
        print_json({"digest": digest, "artifact": a and a.ref, "what": a and _what(a),
                    "parents": list(a.parents) if a else []}
                   for digest, a in known.items())  # fmt: skip
        return
    for line in tree_lines(artifact.digest, known):
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
    as_json: AsJson = False,
    store: StoreUrl = None,
) -> None:
    """Read all files and compare them with the checksums in their manifests."""
    opened = open_now(store)
    chosen = [opened.get(ref) for ref in refs] if refs else opened.list()
    bad = 0
    for artifact in chosen:
        problems = opened.verify(artifact.digest)
        bad += bool(problems)
        if as_json:
            print_json([{"artifact": artifact.ref, "problems": problems}])
            continue
        echo(f"{artifact.ref:<30} {'damaged' if problems else 'ok'}")
        for problem in problems:
            echo(f"  {problem}", err=True)
    if not as_json:
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


def nothing(what: str, opened: Store) -> str:
    """The sentence about an empty list, which names another store that may be meant."""
    from flows.cli.lookup import elsewhere

    return f"No {what} in {opened.url}.{elsewhere(opened)}"


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
