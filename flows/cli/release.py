"""`rlhf models push` and `rlhf models export`: a model for other people and other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.listing import open_now, size_text
from flows.cli.options import StoreUrl
from flows.cli.output import echo

if TYPE_CHECKING:
    from rlhf_core.store import Artifact, Store

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Published name, stage (sft, ppo) or digest.")
]
WhichVersion = Annotated[
    str | None,
    typer.Option("--version", help="Number of a version of the name; default: the champion."),
]
Adapter = Annotated[
    bool,
    typer.Option(
        "--adapter/--merged", help="Only the LoRA adapter of the last stage, or the whole model."
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base", metavar="OWNER/NAME", help="Hub id of the adapter's base model, if not known."
    ),
]

NO_GGUF = (
    "There is no well-kept package that writes GGUF from a model's folder: export to a folder "
    "first, then convert that with llama.cpp: python convert_hf_to_gguf.py FOLDER --outfile "
    "model.gguf (docs/releasing.md)."
)


def push(
    model: Model,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="hub:OWNER/NAME.")],
    version: WhichVersion = None,
    adapter: Adapter = False,
    base: Base = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private, if it is new.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="BRANCH", help="Branch; made if missing.")
    ] = None,
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="Message of the commit.")
    ] = None,
    store: StoreUrl = None,
) -> None:
    """Push a model with a model card to the Hugging Face hub, as one commit."""
    from tasks.release import hub
    from tasks.release.contents import make_release

    repo = hub.parse_target(target)
    opened = open_now(store)
    artifact = _find(opened, model, version)
    hub.check_access(repo, private)
    release = make_release(opened, artifact, "adapter" if adapter else "merged", base, repo)
    folder = opened.fetch(release.digest)
    echo(f"{artifact.ref}: {len(release.files)} files, {size_text(release.size)} -> {repo}")
    text = message or f"{artifact.metadata.get('name') or model} ({artifact.ref})"
    done = hub.push(folder, repo, text, private=private, branch=revision)
    echo(f"{done.url} ({'private' if done.private else 'public'})")
    echo(f"commit {done.commit}" if done.new else f"Nothing is new since commit {done.commit}.")


def export(
    model: Model,
    folder: Annotated[Path, typer.Argument(help="New or empty folder for the files.")],
    version: WhichVersion = None,
    form: Annotated[
        str, typer.Option("--format", help="safetensors: a folder that from_pretrained opens.")
    ] = "safetensors",
    adapter: Adapter = False,
    base: Base = None,
    store: StoreUrl = None,
) -> None:
    """Write a model with a model card to a folder, for other programs. Each file is verified."""
    from rlhf_core.errors import ConfigError
    from tasks.release.contents import make_release

    if form == "gguf":
        raise ConfigError(NO_GGUF)
    if form != "safetensors":
        raise typer.BadParameter(f"{form}: the format is safetensors")
    opened = open_now(store)
    artifact = _find(opened, model, version)
    release = make_release(opened, artifact, "adapter" if adapter else "merged", base)
    opened.fetch(release.digest, folder)
    echo(f"{artifact.ref} -> {folder} ({len(release.files)} files, {size_text(release.size)})")


def _find(store: Store, model: str, version: str | None) -> Artifact:
    from flows.cli.lookup import find_model
    from rlhf_core.store import registry

    if version is None:
        return find_model(store, model)
    return store.get(registry.read_model(store, model).find(version).digest)
