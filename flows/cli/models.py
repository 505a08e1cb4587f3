"""The commands `rlhf models ...`: versions of published models, and their champions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.listing import nothing, open_now, size_text, tree_lines
from flows.cli.options import AsJson, StoreUrl
from flows.cli.output import echo, print_json, table
from flows.cli.runs import short_metrics

if TYPE_CHECKING:
    from rlhf_core.store import Artifact, Store
    from rlhf_core.store.versions import Model, Version

models = typer.Typer(
    help="Published models: list, show, promote, rollback, archive, diff, push, export.",
    no_args_is_help=True,
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="Published name (publish.name).")]
VersionRef = Annotated[
    str,
    typer.Argument(metavar="VERSION", help="Number of a version, or start of its digest."),
]
Reason = Annotated[str, typer.Option("--reason", help="Reason, for the history.")]


@models.command("list")
def list_models(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="List only this model.")
    ] = None,
    as_json: AsJson = False,
    store: StoreUrl = None,
) -> None:
    """List the versions: champions, candidates and archived ones."""
    from rlhf_core.errors import ArtifactCorrupt
    from rlhf_core.store import registry

    opened = open_now(store)
    found, damaged = [], []
    for each in registry.model_names(opened) if name is None else [name]:
        try:
            found.append(registry.read_model(opened, each))
        except ArtifactCorrupt as error:
            damaged.append(str(error))
    lines = [line for model in found for line in _described(opened, model)]
    if as_json:
        print_json(lines)
    elif lines:
        _print_versions(lines)
    elif not damaged:
        echo(f"{nothing('models', opened)} `rlhf run --preset demo` makes one.")
    for text in damaged:
        echo(f"Error: {text}", err=True)
    if damaged:
        raise typer.Exit(1)


def _print_versions(lines: list[dict[str, Any]]) -> None:
    rows = [["NAME", "VERSION", "STATE", "DIGEST", "SINCE (UTC)", "RUN", "METRICS", "REASON"]]
    rows += [
        [line["name"], str(line["version"]), line["state"], line["digest"][:12],
         line["time"][:16].replace("T", " "), line["run"] or "-", _short(line), line["reason"][:70]]
        for line in lines
    ]  # fmt: skip
    table(rows)
    if any(line["state"] == "candidate" for line in lines):
        echo("\nA candidate becomes champion by hand: rlhf models promote NAME VERSION")


@models.command("show")
def show_model(
    name: Name,
    version: Annotated[
        str | None,
        typer.Argument(metavar="VERSION", help="Number or digest; default: the champion."),
    ] = None,
    as_json: AsJson = False,
    store: StoreUrl = None,
) -> None:
    """Show one version, its lineage, and the history of its name."""

    import yaml

    from rlhf_core.store import registry

    opened = open_now(store)
    model = registry.read_model(opened, name)
    chosen = model.find(version) if version else model.champion or model.versions[-1]
    line = next(x for x in _described(opened, model) if x["version"] == chosen.number)
    numbers = {v.digest: v.number for v in model.versions}
    history: list[dict[str, Any]] = [
        {"number": t.number, "time": t.time, "action": t.action, "version": numbers[t.digest],
         "run": t.run, "reason": t.reason}
        for t in model.history
    ]  # fmt: skip
    if as_json:
        print_json([{**line, "history": history}])
        return
    size = "not in the store" if line["size"] is None else size_text(line["size"])
    if chosen.state == "candidate":
        echo(f"# To make it the champion: rlhf models promote {name} {chosen.number}")
    echo(yaml.safe_dump({**line, "size": size}, sort_keys=False, allow_unicode=True))
    if line["size"] is not None:
        for text in tree_lines(chosen.digest, opened.lineage(chosen.digest)):
            echo(text)
        echo()
    rows = [["TIME (UTC)", "ACTION", "VERSION", "RUN", "REASON"]]
    rows += [
        [t["time"][:19].replace("T", " "), t["action"], str(t["version"]), t["run"] or "-",
         t["reason"]]
        for t in history
    ]  # fmt: skip
    table(rows)


@models.command()
def promote(name: Name, version: VersionRef, reason: Reason = "", store: StoreUrl = None) -> None:
    """Make a version the champion, which `rlhf chat` and the next retraining use."""
    from rlhf_core.store import registry

    opened = open_now(store)
    chosen = registry.read_model(opened, name).find(version)
    transition = registry.promote(opened, name, chosen.digest, reason=reason)
    _switched(opened, name, changed=transition is not None)


@models.command()
def rollback(name: Name, reason: Reason = "", store: StoreUrl = None) -> None:
    """Make the previous champion the champion again."""
    from rlhf_core.store import registry

    opened = open_now(store)
    registry.rollback(opened, name, reason=reason)
    _switched(opened, name, changed=True)


@models.command()
def archive(name: Name, version: VersionRef, reason: Reason = "", store: StoreUrl = None) -> None:
    """Archive a candidate. `rlhf artifacts gc` may delete it later."""
    from rlhf_core.store import registry

    opened = open_now(store)
    chosen = registry.read_model(opened, name).find(version)
    transition = registry.archive(opened, name, chosen.digest, reason=reason)
    echo(f"{name}: version {chosen.number} {'is' if transition else 'was'} archived.")


@models.command()
def diff(
    name: Name,
    left: Annotated[str, typer.Argument(metavar="A", help="Version, by number or digest.")],
    right: Annotated[str, typer.Argument(metavar="B", help="Version to compare with.")],
    as_json: AsJson = False,
    store: StoreUrl = None,
) -> None:
    """Compare two versions: settings of their jobs, metrics, lineage, size."""

    from flows.cli.diff import difference
    from rlhf_core.store import registry

    opened = open_now(store)
    model = registry.read_model(opened, name)
    chosen = [model.find(reference) for reference in (left, right)]
    found = difference(opened, *(opened.get(version.digest) for version in chosen))
    if as_json:
        sides = [{"version": v.number, "digest": v.digest, "state": v.state} for v in chosen]
        print_json([{"name": name, "versions": sides, **found}])
        return
    heads = [f"{v.number} ({v.state})" for v in chosen]
    _print_pairs("SETTING", heads, found["settings"])
    _print_pairs("METRIC", heads, found["metrics"])
    lineage = {
        stage: pair if pair[0] != pair[1] else [pair[0], "the same"]
        for stage, pair in found["lineage"].items()
    }
    _print_pairs("MADE BY", heads, lineage)
    _print_pairs("", heads, {"size": [size_text(count) for count in found["size"]]})


# --------------------------------------------------------------------------- shared


def _described(opened: Store, model: Model) -> list[dict[str, Any]]:
    """The versions of a model with size and metrics of their artifacts."""
    from flows.cli.diff import evaluated, headline
    from rlhf_core.errors import ArtifactCorrupt, ArtifactNotFound
    from rlhf_core.store.parallel import REQUESTS_AT_ONCE, in_parallel

    kinds = {artifact.digest: artifact for artifact in opened.list("published")}

    def describe(version: Version) -> dict[str, Any]:
        artifact: Artifact | None = kinds.get(version.digest)
        try:
            artifact = artifact or opened.get(version.digest)
        except (ArtifactNotFound, ArtifactCorrupt):
            artifact = None
        return {
            "name": model.name,
            "version": version.number,
            "state": version.state,
            "digest": version.digest,
            "time": version.time,
            "run": version.run,
            "reason": version.reason,
            "size": artifact.size if artifact else None,
            "metrics": headline(evaluated(opened, artifact)) if artifact else {},
        }

    return in_parallel(describe, model.versions, REQUESTS_AT_ONCE)


def _short(line: dict[str, Any]) -> str:
    return "not in the store" if line["size"] is None else short_metrics(line["metrics"])


def _switched(opened: Store, name: str, changed: bool) -> None:
    """Print the champion, update its published folder, and emit the event of a new champion."""
    from rlhf_core.store import registry
    from rlhf_core.store.published_folder import materialise, published_folder

    champion = registry.read_model(opened, name).champion
    assert champion is not None
    artifact = opened.get(champion.digest)
    echo(
        f"{name}: version {champion.number} ({artifact.ref}) {'is' if changed else 'was'} "
        f"the champion{' now' if changed else ' already'}."
    )
    if (folder := published_folder(name)).is_dir():
        echo(f"  model     {materialise(opened, artifact, folder)}")
    if changed:
        _announce(opened, name, artifact)


def _announce(opened: Store, name: str, artifact: Artifact) -> None:
    """Emit the event of a new champion, if there is a Prefect server."""
    from prefect.settings import PREFECT_API_URL

    if PREFECT_API_URL.value():
        from tasks import assets

        assets.published(opened, name, artifact, "")


def _print_pairs(title: str, heads: list[str], pairs: dict[str, list[Any]]) -> None:
    if not pairs:
        return
    echo()
    rows = [[title, *heads]]
    for name, (left, right) in pairs.items():
        rows.append([name, _cell(left), _cell(right)])
        if all(isinstance(x, float) for x in (left, right)):
            rows[-1][2] += f" ({right - left:+.4g})"
    table(rows)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
