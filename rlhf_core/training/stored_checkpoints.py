"""Checkpoints in the store: listing them, and fetching what the ranks of a machine need of one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from rlhf_core.errors import ArtifactCorrupt, ArtifactNotFound, StoreError
from rlhf_core.runtime.context import StageContext
from rlhf_core.store import Artifact, Store
from rlhf_core.training.sharding.parts import Index, Saved, from_json, index_whole, needed_files
from rlhf_core.training.strategy import Strategy

KIND = "checkpoint"
INDEX = "index.json"
WHOLE = ("weights.safetensors", "optimizer.safetensors")  # of earlier versions


def step_of(checkpoint: Artifact) -> int:
    """Finished steps of a checkpoint."""
    return int(checkpoint.metadata["step"])


def newest_first(store: Store) -> list[Artifact]:
    """The checkpoints in a stage's prefix of the store."""
    return sorted(store.list(KIND), key=step_of, reverse=True)


def fetch_parts(
    store: Store, checkpoint: Artifact, folder: Path, context: StageContext, strategy: Strategy
) -> Saved | StoreError:
    """Fetch what this machine's ranks need of a checkpoint. Every rank calls.

    Args:
        folder: which these ranks share.

    Returns:
        Its tensors; or, on every rank, why one machine could not fetch them.
    """
    group = strategy.group
    index = group.broadcast(_read_index(store, checkpoint) if context.main else None)
    if isinstance(index, StoreError):
        return index
    files = {file.path for file in checkpoint.files}
    if index is not None:
        parts = {part[0] for entry in index.values() for part in entry.parts}
        files = files - parts | needed_files(index, strategy.held())
    machine = context.rank - context.local_rank  # its first rank
    everyones = group.gather((machine, files))
    problem = None
    if context.local_rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        wanted = {path for where, files in everyones if where == machine for path in files}
        try:
            store.fetch(checkpoint.digest, folder, wanted)
        except (ArtifactNotFound, ArtifactCorrupt) as error:
            problem = error
    problem = next(filter(None, group.gather(problem)), None)
    return problem or open_saved(folder)


def open_saved(folder: Path) -> Saved:
    """The tensors of a checkpoint, of which all files or some are in a folder."""
    if (folder / INDEX).exists():
        return Saved(folder, from_json(json.loads((folder / INDEX).read_text())))
    return Saved(folder, index_whole(folder / name for name in WHOLE))


def _read_index(store: Store, checkpoint: Artifact) -> Index | StoreError | None:
    """Where a checkpoint's tensors are; None in one of an earlier version, which are whole. Or why
    it cannot be read."""
    if all(file.path != INDEX for file in checkpoint.files):
        return None
    try:
        return from_json(json.loads(store.read_bytes(checkpoint.digest, INDEX)))
    except (ArtifactNotFound, ArtifactCorrupt) as error:
        return error
