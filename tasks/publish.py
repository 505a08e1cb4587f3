"""Publishing: the aligned model with its model card, as an artifact and as a plain folder.

Nothing is copied in the store: the artifact takes over the aligned model's files by content.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect.logging import get_run_logger

from rlhf_core.errors import ModelError
from rlhf_core.store import Artifact, FileEntry, Store, rlhf_home
from tasks import assets
from tasks.events import say, seconds
from tasks.model_card import model_card
from tasks.run import Run, StageResult, elapsed
from tasks.stages import stage

VERSION = 1  # raised when a published folder's contents change
NOT_PUBLISHED = {"metrics.jsonl", "README.md"}


@stage("publish")
def publish(run: Run, policy: str, evaluation: str) -> StageResult:
    """The aligned model under the name `publish.name`.

    Args:
        policy: digest of the aligned model.
        evaluation: digest of its evaluation.
    """
    began = time.monotonic()
    log = get_run_logger()
    name = run.config.publish.name
    key = publish_key(name, policy, evaluation)
    artifact = run.store.stage_result(key)
    reused = artifact is not None
    if artifact is None:
        artifact = run.store.commit_stage(key, make_artifact(run, name, policy, evaluation))
        assets.made(run.store, "publish", artifact, {})
    record_model(run.store, name, artifact, run.id)
    run.model_folder = materialise(run.store, artifact, rlhf_home() / "published" / name)
    result = StageResult(
        stage="publish", digest=artifact.digest, kind=artifact.kind, key=key,
        reused=reused, seconds=elapsed(began),
    )  # fmt: skip
    how = "reused" if reused else f"done in {seconds(result.seconds)}"
    say(
        log, "done", "publish", f"{how}, {artifact.ref} as {name}",
        reused=reused, seconds=result.seconds, ref=artifact.ref, metrics={},
    )  # fmt: skip
    return run.add(result)


def publish_key(name: str, policy: str, evaluation: str) -> str:
    """Stage key of a published model."""
    parts = ["publish", VERSION, name, policy, evaluation]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def make_artifact(run: Run, name: str, policy: str, evaluation: str) -> Artifact:
    """Publish the model's own files with a model card beside them.

    Raises:
        ModelError: the aligned model's artifact is not a Hugging Face model folder.
    """
    source = run.store.get(policy)
    files: dict[str, Path | FileEntry | bytes] = {
        entry.path: entry for entry in source.files if entry.path not in NOT_PUBLISHED
    }
    if "config.json" not in files or not any(path.endswith(".safetensors") for path in files):
        raise ModelError(
            f"artifact {source.ref} holds no config.json with .safetensors files but "
            f"{', '.join(sorted(files)[:8])}; it cannot be published as a model."
        )
    files["README.md"] = model_card(run, name, policy, evaluation).encode()
    return run.store.publish_derived(
        kind="published",
        files=files,
        metadata={"name": name, "policy": policy, "evaluation": evaluation},
        parents=[policy, evaluation],
    )


def record_model(store: Store, name: str, artifact: Artifact, run_id: str) -> None:
    """Make an artifact the newest model of that name, unless it is that already."""
    newest = newest_record(store, name)
    if newest is not None and newest.get("digest") == artifact.digest:
        return
    stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}Z"
    store.write_record(
        f"models/{name}/{stamp}-{artifact.digest[:12]}.json",
        {"name": name, "digest": artifact.digest, "run": run_id, "time": stamp},
    )
    assets.published(store, name, artifact, run_id)


def newest_record(store: Store, name: str) -> dict[str, Any] | None:
    """The record of the newest model of that name."""
    records = store.list_records(f"models/{name}/")
    return store.read_record(records[-1]) if records else None


def champion(run: Run) -> str | None:
    """Digest of the policy that is published under the run's name now."""
    newest = newest_record(run.store, run.config.publish.name)
    if newest is None:
        return None
    policy = run.store.get(newest["digest"]).metadata.get("policy")
    return str(policy) if policy else None


def materialise(store: Store, artifact: Artifact, folder: Path) -> Path:
    """The artifact's files in a plain folder; one that was there is replaced in one step."""
    mark = folder.parent / f".{folder.name}.digest"
    if folder.is_dir() and mark.is_file() and mark.read_text() == artifact.digest:
        return folder
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    shutil.rmtree(fresh, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    store.fetch(artifact.digest, fresh)
    mark.unlink(missing_ok=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    mark.write_text(artifact.digest)
    shutil.rmtree(old, ignore_errors=True)
    return folder
