"""Full training state in the store while training goes on, and going on from the newest.

A checkpoint is an artifact in the stage's own corner of the store (`checkpoints/<stage key>/`),
so that its blobs can be deleted without looking at anyone else's. It holds the trained weights
(fp32 masters), the optimizer's states, each rank's generator state, the counters and the metrics
logged so far; all whole, not sharded, so that any number of ranks can go on from it.
"""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rlhf_core.context import StageContext
from rlhf_core.errors import ArtifactCorrupt, ArtifactNotFound
from rlhf_core.jobs import Resources
from rlhf_core.store import Artifact
from rlhf_core.strategy import Strategy

KIND = "checkpoint"


class Checkpointer:
    """Saves every n steps, keeps the newest k, and restores. All ranks call every method."""

    def __init__(self, context: StageContext, strategy: Strategy, resources: Resources) -> None:
        self._context = context
        self._strategy = strategy
        self._every = resources.checkpoint_every
        self._keep = resources.keep_checkpoints
        self._store = context.store.scoped(f"checkpoints/{context.key}")
        self._upload: threading.Thread | None = None

    # ------------------------------------------------------------------ save

    def after_step(self, step: int, total: int, counters: dict[str, Any] | None = None) -> None:
        """Save if it is time: every n steps, but not after the last, whose result is published.

        Args:
            step: finished steps, from 1.
            counters: anything of the loop's own that JSON can hold.
        """
        if step % self._every == 0 and step < total:
            self.save(step, counters or {})

    def save(self, step: int, counters: dict[str, Any]) -> None:
        """Copy the state to this machine's disk, then publish it in the background (rank 0)."""
        weights = self._strategy.weights(keep=self._context.main)
        optimizer = self._strategy.optimizer_state(keep=self._context.main)
        generators = self._strategy.group.gather(torch.get_rng_state())
        if not self._context.main:
            return
        self._wait()  # at most one upload at a time
        folder = self._context.folder / "checkpoint"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        save_file(weights, folder / "weights.safetensors")
        save_file(optimizer, folder / "optimizer.safetensors")
        save_file(
            {f"rank{i}": state for i, state in enumerate(generators)}, folder / "rng.safetensors"
        )
        (folder / "state.json").write_text(json.dumps({"step": step, "counters": counters}))
        if self._context.metrics_path.exists():
            shutil.copy(self._context.metrics_path, folder / "metrics.jsonl")
        self._upload = threading.Thread(target=self._publish, args=(folder, step), daemon=True)
        self._upload.start()

    def _publish(self, folder: Path, step: int) -> None:
        try:
            self._store.publish(folder, kind=KIND, metadata={"step": step})
            for old in self._newest_first()[self._keep :]:
                self._store.delete(old.digest, blobs=True)
        except Exception as error:  # training goes on; the next checkpoint tries again
            print(f"WARNING: checkpoint {step} was not stored: {error}", flush=True)

    def _newest_first(self) -> list[Artifact]:
        found = self._store.list(KIND)
        return sorted(found, key=lambda a: int(a.metadata["step"]), reverse=True)

    def _wait(self) -> None:
        if self._upload is not None:
            self._upload.join()
            self._upload = None

    # ------------------------------------------------------------------ restore

    def restore(self) -> tuple[int, dict[str, Any]]:
        """Load the newest complete checkpoint into the prepared strategy.

        Returns:
            Finished steps (0 without a checkpoint) and the loop's counters.
        """
        folder = self._context.folder / "resume"
        step = self._strategy.group.broadcast(self._fetch(folder) if self._context.main else 0)
        if step == 0:
            return 0, {}
        if self._context.local_rank == 0 and not self._context.main:
            self._fetch(folder, step)  # the first rank of every further machine
        self._strategy.group.barrier()
        state = json.loads((folder / "state.json").read_text())
        self._strategy.load_state(
            load_file(folder / "weights.safetensors"), load_file(folder / "optimizer.safetensors")
        )
        generators = load_file(folder / "rng.safetensors")
        if len(generators) == self._strategy.world_size:
            torch.set_rng_state(generators[f"rank{self._context.rank}"])
        self._strategy.group.barrier()
        if self._context.main and (folder / "metrics.jsonl").exists():
            shutil.copy(folder / "metrics.jsonl", self._context.metrics_path)
        self._strategy.group.barrier()
        if self._context.local_rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        self._context.log(f"going on from the checkpoint after step {step}")
        return step, state["counters"]

    def _fetch(self, folder: Path, step: int | None = None) -> int:
        """Fetch the newest sound checkpoint (or that of a step); returns its step, 0 for none."""
        for artifact in self._newest_first():
            if step is not None and int(artifact.metadata["step"]) != step:
                continue
            shutil.rmtree(folder, ignore_errors=True)
            try:
                self._store.fetch(artifact.digest, folder)
            except (ArtifactCorrupt, ArtifactNotFound) as error:
                print(f"WARNING: checkpoint skipped: {error}", flush=True)
                continue
            return int(artifact.metadata["step"])
        return 0

    # ------------------------------------------------------------------ end

    def finish(self) -> None:
        """Wait for the upload; call after the result is published, which replaces them all."""
        if not self._context.main:
            return
        self._wait()
        for artifact in self._newest_first():
            self._store.delete(artifact.digest, blobs=True)
