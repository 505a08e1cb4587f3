"""Publishing: the final model with its model card, as an artifact and as a folder of files.

A version is champion of its name, or a candidate that can be promoted (store/registry.py). Nothing
is copied in the store: the artifact refers to the model's files by content.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

from prefect.logging import get_run_logger

from rlhf_core.errors import JobFailed, ModelError, RLHFError
from rlhf_core.store import Artifact, FileEntry, registry
from rlhf_core.store.published_folder import materialise, published_folder
from tasks import assets
from tasks.events import log_event, seconds
from tasks.reporting.benchmarks import STAGE, benchmarks_digest
from tasks.reporting.model_card import model_card
from tasks.run import Run, StageResult, elapsed
from tasks.stages import compare, stage

VERSION = 1  # raised when a published folder's contents change
NOT_PUBLISHED = {"metrics.jsonl", "README.md"}


@stage("publish")
def publish(run: Run, policy: str, evaluation: str, reason: str = "") -> StageResult:
    """Publish the final model under the name `publish.name`, and make it champion.

    Args:
        policy: digest of the final model.
        evaluation: digest of its evaluation.
        reason: why it is champion, for the history.
    """
    began = time.monotonic()
    name = run.config.publish.name
    key = publish_key(name, policy, evaluation, benchmarks_digest(run))
    artifact, reused = published_artifact(run, "publish", key, policy, evaluation)
    changed = registry.promote(run.store, name, artifact.digest, run=run.id, reason=reason)
    if changed is not None:
        assets.published(run.store, name, artifact, run.id)
    newest = registry.champion(run.store, name)  # another run may have promoted its own since
    shown = run.store.get(newest) if newest else artifact
    run.model_folder = materialise(run.store, shown, published_folder(name))
    return _done(run, "publish", key, artifact, reused, began, f"as {name}")


@stage("candidate")
def keep_candidate(run: Run, policy: str, evaluation: str | None, reason: str) -> StageResult:
    """Keep the model as a candidate of the name `publish.name`; the champion does not change.

    Args:
        policy, evaluation: as for `publish`; evaluation None: the model was not evaluated.
        reason: why it was not published.
    """
    began = time.monotonic()
    name = run.config.publish.name
    key = publish_key(name, policy, evaluation, benchmarks_digest(run))
    artifact, reused = published_artifact(run, "candidate", key, policy, evaluation)
    registry.add_candidate(run.store, name, artifact.digest, run=run.id, reason=reason)
    what = f"as a candidate of {name}: {reason}"
    return _done(run, "candidate", key, artifact, reused, began, what)


def keep_last_good_policy(run: Run, failed: JobFailed) -> JobFailed:
    """Keep the last good policy of a collapsed training as a candidate.

    Args:
        failed: a failure with a `candidate`.

    Returns:
        The failure with a message that names the candidate.
    """
    name = run.config.publish.name
    try:
        reason = str(run.store.get(failed.candidate).metadata.get("reason") or "collapsed")
        kept = keep_candidate(run, failed.candidate, None, reason)
        number = registry.read_model(run.store, name).find(kept.digest).number
        text = (
            f"It is kept as version {number} of {name}, a candidate: `rlhf models show {name} "
            f"{number}` shows it, `rlhf chat {kept.digest[:12]}` starts a chat with it."
        )
    except RLHFError as error:  # must not replace the reason of the failure
        text = f"It could not be kept as a candidate of {name}: {error}"
    return JobFailed(f"{failed}\n{text}", failed.category, failed.candidate)


def published_artifact(
    run: Run, stage: str, key: str, policy: str, evaluation: str | None
) -> tuple[Artifact, bool]:
    """The published artifact, and whether it was reused."""
    artifact = run.store.stage_result(key)
    if artifact is not None:
        return artifact, True
    artifact = make_artifact(run, run.config.publish.name, policy, evaluation)
    artifact = run.store.commit_stage(key, artifact)
    assets.made(run.store, stage, artifact, {})
    return artifact, False


def _done(
    run: Run, stage: str, key: str, artifact: Artifact, reused: bool, began: float, what: str
) -> StageResult:
    """Log the stage's result and add it to the run."""
    result = StageResult(
        stage=stage, digest=artifact.digest, kind=artifact.kind, key=key,
        reused=reused, seconds=elapsed(began),
    )  # fmt: skip
    name = run.config.publish.name
    version = registry.read_model(run.store, name).find(artifact.digest)
    run.version = {
        "name": name, "number": version.number, "digest": artifact.digest,
        "state": version.state, "reason": version.reason,
    }  # fmt: skip
    how = "reused" if reused else f"done in {seconds(result.seconds)}"
    log_event(
        get_run_logger(), "done", stage, f"{how}, {artifact.ref} {what}",
        reused=reused, seconds=result.seconds, ref=artifact.ref, metrics={},
    )  # fmt: skip
    return run.add(result)


def publish_key(
    name: str, policy: str, evaluation: str | None, benchmarks: str | None = None
) -> str:
    """Stage key of a published model, whose card shows evaluation and benchmarks."""
    parts = ["publish", VERSION, name, policy, evaluation]
    parts += [benchmarks] if benchmarks else []
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def make_artifact(run: Run, name: str, policy: str, evaluation: str | None) -> Artifact:
    """Publish the model's files with a model card.

    Raises:
        ModelError: the model's artifact is not a Hugging Face model folder.
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
    digest = benchmarks_digest(run)
    benchmarks = {STAGE: digest} if digest else {}
    files["README.md"] = model_card(run, name, policy, evaluation).encode()
    judged = {} if evaluation is None else {"evaluation": evaluation}
    return run.store.publish_derived(
        kind="published",
        files=files,
        metadata={"name": name, "policy": policy, **judged, **benchmarks},
        parents=[policy, *judged.values(), *benchmarks.values()],
    )


def champion(run: Run) -> str | None:
    """Digest of the policy of the current champion of the run's name."""
    published = registry.champion(run.store, run.config.publish.name)
    if published is None:
        return None
    policy = run.store.get(published).metadata.get("policy")
    return str(policy) if policy else None


def compare_with_champion(run: Run) -> StageResult | None:
    """Evaluate the final model and the champion on the same held-out prompts; None without a
    champion, or if the champion is this model."""
    found = champion(run)
    if found is None or found == run.artifacts_by_role["model"]:
        return None
    if "compare" in run.stages:  # a retraining asks again
        return run.stages["compare"]
    result: StageResult = compare(run, run.artifacts_by_role, found)
    return result
