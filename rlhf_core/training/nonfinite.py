"""A loss or gradient that is NaN or infinite: save the batch that caused it, advise what to do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from rlhf_core.errors import NonFinite, RateLowered, StoreError
from rlhf_core.training.checkpoint import Checkpointer

KIND = "diagnostic"
MAX_LOWERINGS = 2
UPLOAD_SECONDS = 60.0  # to wait for the last checkpoint, which may still be uploading


def failure(
    error: NonFinite,
    checkpointer: Checkpointer,
    step: int,
    rows: Sequence[Mapping[str, Any]],
    more: list[int] | Mapping[str, Tensor],
) -> NonFinite:
    """Save the step's batch for inspection and make the error that the stage ends with.

    Called by the ranks that found it: the one whose loss it was, or all for a gradient norm.

    Args:
        step: the step that failed, from 1.
        rows: the global batch.
        more: positions in it of this rank's last micro-batch, or tensors with a row for each of
            its rows.

    Returns:
        RateLowered where `on_nonfinite` asks for another attempt with a lower learning rate.
    """
    context, job = checkpointer.context, checkpointer.job
    name = f"{job.algorithm} step {step}"
    where = save_batch(error, checkpointer, step, rows, more)
    # The other ranks wait meanwhile; this must end before their collective times out.
    kept = checkpointer.settle(min(UPLOAD_SECONDS, job.resources.collective_timeout / 2))
    last = {None: "the last checkpoint in the store", 0: "the beginning (no checkpoint yet)"}.get(
        kept, f"the checkpoint after step {kept}"
    )
    found = f"{name}, rank {context.rank}: {error}. Its batch is {where}."
    factor = job.on_nonfinite
    if factor == "fail":
        return NonFinite(
            f"{found} Set {job.algorithm}.on_nonfinite to 0.5, say, and run again: the stage then "
            f"goes on from {last} with half the learning rate. Or lower learning_rate, or use "
            "precision fp32: the stage then starts anew, and those before it are reused."
        )
    if len(context.lowered) >= MAX_LOWERINGS:
        return NonFinite(
            f"{found} on_nonfinite has lowered the learning rate {len(context.lowered)} times "
            f"already, to {checkpointer.rate:g} of what was set: look at the batch, or set another "
            "learning_rate or precision fp32; the stage then starts anew."
        )
    checkpointer.lower(step, factor)
    return RateLowered(
        f"{found} As {job.algorithm}.on_nonfinite says, the next attempt goes on from {last} with "
        f"the learning rate times {checkpointer.rate * factor:g}."
    )


def save_batch(
    error: NonFinite,
    checkpointer: Checkpointer,
    step: int,
    rows: Sequence[Mapping[str, Any]],
    more: list[int] | Mapping[str, Tensor],
) -> str:
    """Write the batch into the job folder and the store; a text that says where it is."""
    context, job = checkpointer.context, checkpointer.job
    folder = context.folder / f"nonfinite-step{step}-rank{context.rank}"
    folder.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {
        "step": step, "rank": context.rank, "problem": str(error),
        "learning_rate": job.learning_rate, "rate": checkpointer.rate, "rows": list(rows),
    }  # fmt: skip
    if isinstance(more, Mapping):
        tensors = {name: value.contiguous().clone() for name, value in more.items()}
        save_file(tensors, folder / "batch.safetensors")
    else:
        about["micro_batch"] = more
    (folder / "batch.json").write_text(json.dumps(about, ensure_ascii=False, default=str))
    try:
        artifact = context.store.publish(
            folder,
            kind=KIND,
            metadata={"step": step, "rank": context.rank, "key": context.key},
            parents=list(job.inputs().values()),
        )
    except StoreError as problem:  # must not hide the reason
        return f"in {folder} ({problem})"
    return f"{artifact.ref} (`rlhf artifacts pull`), and in {folder}"
