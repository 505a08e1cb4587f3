"""Looks up models, artifacts and runs by what a user types: name, stage, digest or run id."""

from __future__ import annotations

import difflib
import logging
import os
import re
import socket
from typing import Any

import psutil
from pydantic import BaseModel, ValidationError

from rlhf_core.errors import ArtifactNotFound
from rlhf_core.store import Artifact, Store, registry
from rlhf_core.store.parallel import REQUESTS_AT_ONCE, in_parallel
from rlhf_core.system.printable import printable

log = logging.getLogger("rlhf")

MODEL_KINDS = ("model", "published")
DIGEST = re.compile(r"([a-z0-9._-]+/)?[0-9a-f]{6,64}")


def elsewhere(store: Store) -> str:
    """A hint for who misses something in a store: another one that may be meant; "" without."""
    from flows.cli import system
    from flows.server import DEFAULT_URL, unreachable

    running = system.read()
    if running is not None:
        if not running.store or running.store.rstrip("/") == store.url.rstrip("/"):
            return ""
        return (
            f" The system that runs here has another store, {running.store}: leave out --store "
            "and RLHF_STORE to see it."
        )
    url = os.environ.get("PREFECT_API_URL") or DEFAULT_URL
    if unreachable(url, 1.0) is not None:
        return ""
    return (
        f" A Prefect server runs at {url}: if `rlhf up` has started it in another folder, use this "
        "command there, or name its store with --store."
    )


class _Stage(BaseModel):
    digest: str
    kind: str
    reused: bool = False
    seconds: float = 0.0
    work: dict[str, Any] = {}
    metrics: dict[str, Any] = {}


class _RunRecord(BaseModel):
    """What commands rely on in a run's record; `tasks.run.Run` writes it."""

    id: str
    name: str
    state: str
    started: str
    error: str | None = None
    waiting: str | None = None
    config: dict[str, Any] | None = None
    stages: dict[str, _Stage] | None = None


def run_records(store: Store) -> dict[str, dict[str, Any]]:
    """The records below runs/ by their paths, whatever is in them. A run whose process is gone has
    the state "died"."""
    paths = store.list_records("runs/")
    records = in_parallel(store.read_record, paths, REQUESTS_AT_ONCE)
    found = {
        path: record for path, record in zip(paths, records, strict=True) if record is not None
    }
    for run in found.values():
        if run.get("state") == "running" and not _alive(run):
            run["state"] = "died"
    return found


def read_runs(store: Store) -> list[dict[str, Any]]:
    """The records of all runs, newest first. What is no record of a run is named and left out."""
    runs = []
    for path, record in run_records(store).items():
        try:
            _RunRecord.model_validate(record)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            text = f"record {path} in {store.url} is left out, it is none of a run: {where}: "
            log.warning("%s", printable(text + first["msg"]))
        else:
            runs.append(record)
    return sorted(runs, key=lambda run: str(run["started"]), reverse=True)


def _alive(run: dict[str, Any]) -> bool:
    """False if the run's process was on this machine and is gone."""
    if run.get("host") != socket.gethostname():
        return True
    pid = run.get("pid")
    return isinstance(pid, int) and (pid == os.getpid() or psutil.pid_exists(pid))


def find_model(store: Store, reference: str | None) -> Artifact:
    """A model by published name (its champion), by stage of the newest run that has it, or by
    digest; None: the model that was published last.

    Raises:
        ArtifactNotFound: there is no such model.
    """
    names = registry.model_names(store)
    if reference is None or reference in names:
        return _champion(store, reference)
    records = read_runs(store)
    for run in records:
        stage = (run.get("stages") or {}).get(reference)
        if stage is not None and stage.get("kind") in MODEL_KINDS:
            return store.get(stage["digest"])
    if DIGEST.fullmatch(reference):
        artifact = store.get(reference)
        if artifact.kind not in MODEL_KINDS:
            raise ArtifactNotFound(f"{artifact.ref} is a {artifact.kind}, not a language model.")
        return artifact
    stages = sorted({name for run in records for name in _models_of(run)})
    close = difflib.get_close_matches(reference, [*names, *stages], 1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise ArtifactNotFound(
        f"There is no model {reference!r} in {store.url}.{hint} Published: "
        f"{', '.join(names) or 'none'}; stages of runs: {', '.join(stages) or 'none'}; "
        "or a digest from `rlhf artifacts list`."
    )


def _champion(store: Store, name: str | None) -> Artifact:
    """The champion of a name; without a name, the newest champion of all."""
    digest = registry.champion(store, name) if name else registry.newest_champion(store)
    if digest is not None:
        return store.get(digest)
    names = [name] if name else registry.model_names(store)
    if names:
        raise ArtifactNotFound(
            f"{' and '.join(names)} in {store.url} has candidates but no champion: `rlhf models "
            f"list {names[0]}` says why. `rlhf chat DIGEST` talks to one; `rlhf models promote "
            f"{names[0]} VERSION` makes it the champion."
        )
    raise ArtifactNotFound(
        f"No model is published in {store.url} yet; `rlhf run --preset demo` makes one."
        + elsewhere(store)
    )


def _models_of(run: dict[str, Any]) -> list[str]:
    stages = run.get("stages") or {}
    return [name for name, stage in stages.items() if stage.get("kind") in MODEL_KINDS]


def find_any(store: Store, reference: str) -> Artifact:
    """An artifact of any kind, by published name, stage of the newest run that has it, or digest.

    Raises:
        ArtifactNotFound: there is no such artifact.
    """
    names = registry.model_names(store)
    if reference in names:
        return _champion(store, reference)
    for run in read_runs(store):
        stage = (run.get("stages") or {}).get(reference)
        if stage is not None:
            return store.get(stage["digest"])
    if not DIGEST.fullmatch(reference):
        raise ArtifactNotFound(
            f"There is no artifact {reference!r} in {store.url}; expected a digest from `rlhf "
            f"artifacts list`, a stage such as ppo, or a published name "
            f"({', '.join(names) or 'none'})."
        )
    return store.get(reference)
