"""`rlhf playground`: a page to compare models. Its contents are in rlhf_core/playground."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.listing import open_now
from flows.cli.options import StoreUrl
from flows.cli.output import echo

if TYPE_CHECKING:
    from rlhf_core.playground.catalogue import RewardModels, RunChoices
    from rlhf_core.store import Store

PASSWORD = "RLHF_PLAYGROUND_PASSWORD"
RUNS_SHOWN = 50
FIRST = ["model", "pretrain", "sft"]  # sorted first, in this order


def playground(
    host: Annotated[
        str, typer.Option(help="Address to listen on. If other machines can reach it, the "
                               f"command needs a password (${PASSWORD}, or from a prompt).")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the page.")] = 7860,
    memory_gb: Annotated[
        float | None,
        typer.Option(min=0.001, help="GB that all models in memory may take; none: most of the "
                                     "GPU's free memory, or half of the machine's."),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that came with a model.")
    ] = False,
    store: StoreUrl = None,
) -> None:  # fmt: skip
    """Compare models side by side in the browser, with scores, and vote for the better replies."""
    from flows.cli.access import password_for

    password = password_for(host, PASSWORD, "the page")
    opened = open_now(store)
    echo("starting the page (some seconds)")
    import rlhf_core.playground.server as server
    from rlhf_core.evaluation.statistics import accuracy

    server.main(
        opened,
        lambda: catalogue(opened),
        host=host,
        port=port,
        password=password,
        memory_gb=memory_gb,
        accuracy=accuracy,
        trust_remote_code=trust_remote_code,
        on_ready=lambda url: echo(f"{url}  (Ctrl-C ends it)"),
    )


def catalogue(store: Store) -> list[RunChoices]:
    """The models that can be compared: those of each run, newest run first, and published ones."""
    from flows.cli.lookup import read_runs
    from rlhf_core.playground.catalogue import RunChoices

    published = _published(store)
    found = []
    for record in read_runs(store)[:RUNS_SHOWN]:
        models = _models(record)
        if models:
            title = f"{record.get('name', '?')} · {record['id']} · {record.get('state', '?')}"
            found.append(
                RunChoices(record["id"], title, (*models, *published), _reward_models(record))
            )
    if not found and published:
        found.append(RunChoices("", "–", published))
    return found


def _models(record: dict[str, Any]) -> tuple[Any, ...]:
    from rlhf_core.playground.catalogue import Choice

    results = _results(record, "model")
    return tuple(Choice(_name(stage), digest) for stage, digest in results.items())


def _results(record: dict[str, Any], kind: str) -> dict[str, str]:
    """Stage -> digest, in the order of the stages, which a record does not have."""

    def position(stage: str) -> tuple[int, int, str]:
        algorithm, _, number = stage.partition("-")
        early = FIRST.index(algorithm) if algorithm in FIRST else len(FIRST)
        return early, int(number) if number.isdigit() else 0, algorithm

    stages = record.get("stages") or {}
    found = {
        stage: str(result["digest"])
        for stage, result in stages.items()
        if result.get("kind") == kind and result.get("digest")
    }
    return {stage: found[stage] for stage in sorted(found, key=position)}


def _name(stage: str) -> str:
    """Display name of a stage's model."""
    from rlhf_core.pipeline.recipe import display_name

    return "base" if stage == "model" else display_name(stage)


def _published(store: Store) -> tuple[Any, ...]:
    """The champion of each published name."""
    from rlhf_core.errors import StoreError, StoreUnavailable
    from rlhf_core.playground.catalogue import PUBLISHED, Choice
    from rlhf_core.store import registry

    found = []
    for name in registry.model_names(store):
        try:
            if digest := registry.champion(store, name):
                found.append(Choice(f"{PUBLISHED}{name}", store.get(digest).digest))
        except StoreUnavailable:
            raise
        except StoreError:
            continue  # its artifact is missing or its record is damaged
    return tuple(found)


def _reward_models(record: dict[str, Any]) -> RewardModels | None:
    """A run's reward models, trained by the run or imported."""
    from pydantic import ValidationError

    from rlhf_core.jobs.ensemble import CombineSettings
    from rlhf_core.playground.catalogue import RewardModels

    config = record.get("config") or {}
    found = list(_results(record, "reward_model").values())
    if not found:
        given = config.get("reward_model") or ()
        listed = [given] if isinstance(given, str) else given
        found = [source.removeprefix("artifact:") for source in listed]
    if not found:
        return None
    settings = config.get("reward") or {}
    how = {name: settings[name] for name in CombineSettings.model_fields if name in settings}
    try:
        return RewardModels(tuple(found), CombineSettings(**how))
    except ValidationError:  # another version's: its replies get no scores
        return None
