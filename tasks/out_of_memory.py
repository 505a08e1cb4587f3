"""Retries after an out-of-memory error: with half the micro-batch, at most twice.

Gradient accumulation follows from the batch size, so the stage computes the same result under the
same key. The micro-batch that fits is recorded in the store, for runs that are started again.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from rlhf_core.errors import JobFailed, StoreError
from rlhf_core.jobs import Job, TrainSettings
from rlhf_core.pipeline.placements import response_tokens
from rlhf_core.preflight.fitting import ways_to_fit
from rlhf_core.preflight.memory import estimate
from rlhf_core.store import Store

MAX_HALVINGS = 2
FRACTION_TO_TRY = 0.75  # of the memory that did not fit; settings below it are proposed


def fit(store: Store, job: Job) -> Job:
    """The job with the micro-batch that was recorded after it ran out of memory; unchanged if there
    is no record, or if its placement has changed since."""
    found = _record(store, job)
    return job if found is None else _with_micro_batch(job, found["micro_batch_size"])


def shrink(store: Store, job: Job, error: JobFailed) -> JobFailed:
    """Record half the micro-batch for the next attempt.

    Returns:
        The failure with the memory estimate and the next step. Its category is "memory", which is
        not retried, if the micro-batch cannot be halved again.
    """
    found = _record(store, job) or {}
    tried = int(found.get("micro_batch_size", job.placement().micro_batch_size))
    halved = int(found.get("halved", 0))
    size = _half(job, tried)
    text = f"{error}\n{_estimate(store, _with_micro_batch(job, tried), error)}".rstrip()
    if size is None or halved >= MAX_HALVINGS:
        why = (
            f"micro_batch_size was halved {halved} times already and is {tried}"
            if halved and size is not None
            else f"micro_batch_size is {tried} and cannot be made smaller"
            if hasattr(job, "resources")
            else "the stage has no micro-batch"
        )
        ways = _ways(store, _with_micro_batch(job, tried), error)
        return JobFailed(f"{text}\nNot retried: {why}. Set {'; or '.join(ways)}.", "memory")
    value = {
        "placement": job.placement().model_dump(mode="json"),
        "micro_batch_size": size,
        "halved": halved + 1,
    }
    store.write_record(_path(job), value)
    return JobFailed(
        f"{text}\nThe next attempt has micro_batch_size {size} instead of {tried}; the global "
        "batch stays the same.",
        "oom",
    )


def forget(store: Store, job: Job) -> None:
    """Remove the record of a stage that has finished."""
    store.delete_record(_path(job))


def _path(job: Job) -> str:
    return f"memory/{job.key()}.json"


def _record(store: Store, job: Job) -> dict[str, Any] | None:
    if not hasattr(job, "resources"):
        return None
    found = store.read_record(_path(job))
    same = found is not None and found.get("placement") == job.placement().model_dump(mode="json")
    return found if same else None


def _half(job: Job, size: int) -> int | None:
    """The largest micro-batch of at most half the size that divides a rank's share of a batch."""
    if not hasattr(job, "resources"):
        return None
    share = getattr(job, "batch_size", 0) // getattr(job, "minibatches", 1)
    share //= job.placement().world_size
    size = min(size, share) if share else size
    size //= 2
    while size > 1 and share % size:
        size -= 1
    return size if size >= 1 else None


def _with_micro_batch(job: Job, size: int) -> Job:
    if not hasattr(job, "resources"):
        return job
    placement = job.placement().model_copy(update={"micro_batch_size": size})
    return job.model_copy(update={"resources": placement})


# --------------------------------------------------------------------------- estimate and advice


def _estimate(store: Store, job: Job, error: JobFailed) -> str:
    """The memory estimate in one line; empty for stages without one."""
    known = _known(store, job, error)
    if known is None or not isinstance(job, TrainSettings):
        return ""
    config, length, device, stage = known
    found = estimate(config, job, job.placement(), stage, max_length=length, device=device)
    return f"Estimate with micro_batch_size {job.placement().micro_batch_size}: {found}."


def _ways(store: Store, job: Job, error: JobFailed) -> list[str]:
    """Settings that need clearly less memory."""
    if not hasattr(job, "resources"):
        return ["fewer rows (max_samples), or run the stage on a machine with more memory"]
    settings_of = {"label": "data.preference", "best_of_n": "rejection_sampling"}
    prefix = settings_of.get(job.algorithm, job.algorithm)
    known, found = _known(store, job, error), []
    if known is not None and isinstance(job, TrainSettings):
        config, length, device, stage = known
        place = job.placement()
        now = estimate(config, job, place, stage, max_length=length, device=device).total
        found = ways_to_fit(
            config, job, place, stage, int(FRACTION_TO_TRY * now), max_length=length, device=device
        )
    shorter = (
        "shorter data (max_length), max_new_tokens" if job.algorithm != "sft" else "max_length"
    )
    return [
        *(f"{prefix}: {way}" for way in found),
        f"more ranks with {prefix}.resources.strategy zero2, {shorter}, lora or trainable_layers",
    ]


def _made_by(store: Store, digest: str) -> list[dict[str, Any]]:
    """The job that made a data set, or those that made the sources of a mixture."""
    job = store.get(digest).metadata.get("job", {})
    parts = [store.get(part["data"]).metadata.get("job", {}) for part in job.get("mix", ())]
    return parts or [job]


def _known(
    store: Store, job: Job, error: JobFailed
) -> tuple[dict[str, Any], int, Literal["cpu", "cuda"], str] | None:
    """Model configuration, longest sequence, device and stage; None if they cannot be read."""
    if not isinstance(job, TrainSettings):
        return None
    stage = job.algorithm
    device: Literal["cpu", "cuda"] = "cuda" if "CUDA" in str(error) else "cpu"
    try:
        config = json.loads(store.read_bytes(job.inputs()["model"], "config.json"))
        prompts = getattr(job, "prompts", None)
        made_by = _made_by(store, str(prompts or getattr(job, "data", "")))
        lengths = [int(made.get("max_length") or 512) for made in made_by]
        length = int(getattr(job, "length", None) or max(lengths))
        if prompts is not None:
            length = max(
                int(made.get("max_prompt_length") or longest)
                for made, longest in zip(made_by, lengths, strict=True)
            )
            length += response_tokens(job)
        estimate(config, job, job.placement(), stage, max_length=length, device=device)
    except (StoreError, ValueError, KeyError, TypeError):
        return None  # advice must not replace the failure
    return config, length, device, stage
