"""`rlhf artifacts repair` and `delete`: clear damage away, or an artifact that nothing needs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.gc import FINISHED, digests_of
from flows.cli.listing import open_now, size_text
from flows.cli.options import AsJson, StoreUrl
from flows.cli.output import echo, print_json

if TYPE_CHECKING:
    from rlhf_core.store import Store
    from rlhf_core.store.repair import Damage

GRACE_SECONDS = 86_400.0  # as gc's --grace-hours


def repair(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Repair; otherwise only list.")] = False,
    copies: Annotated[
        list[Path] | None,
        typer.Option("--from", metavar="FOLDER", help="Folder with good copies of files."),
    ] = None,
    lost: Annotated[
        bool,
        typer.Option(
            "--lost",
            help="With --yes, also clear away what an S3 server has an entry for and cannot read, "
            "as SeaweedFS after a power cut. Not while a part of the server is down.",
        ),
    ] = False,
    as_json: AsJson = False,
    store: StoreUrl = None,
) -> None:
    """Find damaged and missing files, manifests and records; --yes repairs. Reads the whole store.

    A file is replaced if this machine's cache, a published folder or --from has it. Otherwise it is
    deleted; a manifest or record that cannot be read moves to quarantine/. What needs it counts as
    not done, so that its stage runs again. Others can train and publish meanwhile. Exit code 1:
    there is damage, and it was only listed.
    """
    opened = open_now(store)
    found = opened.find_damage()
    if yes:
        found = opened.repair(found, copies or [], lost=lost)
    broken = sorted({ref for each in found if not each.healed for ref in each.artifacts})
    needed = references(opened, (ref.rpartition("/")[2] for ref in broken))
    if as_json:
        value = {
            "store": opened.url,
            "repaired": yes,
            "damage": [asdict(each) for each in found],
            "unusable": {ref: [t for t, _ in needed[ref.rpartition("/")[2]]] for ref in broken},
        }
        print_json([value])
    else:
        _show(found, yes)
        for ref in broken:
            texts = [text for text, _ in needed[ref.rpartition("/")[2]]]
            echo(f"Cannot be used: {_short(ref)}; named by {', '.join(texts) or 'nothing'}.")
    if found and not yes:
        raise typer.Exit(1)


def _show(found: list[Damage], repaired: bool) -> None:
    for each in found:
        echo(f"{each.what:<9} {each.scope}{each.key}: {each.problem}")
        if each.done:
            echo(f"{'':<9} {each.done}")
    if not found:
        echo("Nothing is damaged.")
    elif not repaired:
        echo(f"{len(found)} damaged. Nothing was changed; add --yes to repair.")


def delete(
    ref: Annotated[str, typer.Argument(help="Digest, or kind/start.")],
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Delete it although ended runs, candidates, archived versions or other artifacts "
            "name it.",
        ),
    ] = False,
    as_json: AsJson = False,
    store: StoreUrl = None,
) -> None:
    """Delete one artifact, with its files that no other artifact has. Its stage then runs again.

    What something names is refused: runs, versions of models, artifacts that were made from it, and
    writers that are about to use it. --force overrides these, except a champion, a run that has not
    ended, and a writer. Files younger than a day stay for `rlhf artifacts gc`.
    """
    from rlhf_core.errors import ConfigError

    opened = open_now(store)
    kind, digest = opened.resolve(ref)
    found = references(opened, [digest])[digest]
    firm = [text for text, keeps in found if keeps]
    if firm or (found and not force):
        advice = "" if firm else " --force deletes it nevertheless."
        texts = ", ".join(firm or [text for text, _ in found])
        raise ConfigError(f"{_short(f'{kind}/{digest}')} is in use: {texts}.{advice}")
    gone = opened.delete_unused(digest, GRACE_SECONDS)
    named = [text for text, _ in found]
    if as_json:
        value = {"artifact": f"{kind}/{digest}", "files": len(gone.blobs), "bytes": gone.size}
        print_json([{**value, "named_by": named}])
        return
    echo(
        f"Deleted {_short(f'{kind}/{digest}')} and {len(gone.blobs)} files "
        f"({size_text(gone.size)})."
    )
    if named:
        echo(f"It is still named by {', '.join(named)}.")


def references(store: Store, digests: Iterable[str]) -> dict[str, list[tuple[str, bool]]]:
    """What names each of some artifacts: a text, and whether it may not be overridden."""
    from flows.cli.lookup import run_records
    from rlhf_core.errors import ArtifactCorrupt
    from rlhf_core.store import registry

    wanted = set(digests)
    found: dict[str, list[tuple[str, bool]]] = defaultdict(list)
    if not wanted:
        return found
    for name in registry.model_names(store):
        try:
            versions = registry.read_model(store, name).versions
        except ArtifactCorrupt:
            for digest in wanted:
                found[digest].append((f"perhaps the model {name}, whose log is damaged", True))
            continue
        for version in versions:
            if version.digest in wanted:
                text = f"{version.state} version {version.number} of {name}"
                found[version.digest].append((text, version.state == "champion"))
    for run in run_records(store).values():
        for digest in wanted & set(digests_of(store, run)):
            state = str(run.get("state"))
            found[digest].append((f"run {run.get('id')} ({state})", state not in FINISHED))
    for prefix in ("retrain/", "watched/", "candidates/"):
        for path in store.list_records(prefix):
            for digest in wanted & set(digests_of(store, store.read_record(path) or {})):
                found[digest].append((f"record {path}", False))
    for artifact in store.list():
        for digest in wanted & set(artifact.parents):
            found[digest].append((f"{artifact.ref}, which was made from it", False))
    return found


def _short(ref: str) -> str:
    kind, _, digest = ref.rpartition("/")
    return f"{kind}/{digest[:12]}"
