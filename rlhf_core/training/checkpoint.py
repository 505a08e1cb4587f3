"""Checkpoints: the full training state in the store, and resuming from the newest one.

A checkpoint is an artifact in the stage's own prefix of the store (`checkpoints/<stage key>/`), so
that its blobs can be deleted without checking whether other artifacts use them. It has the trained
weights (fp32 masters), the optimizer's states, each rank's generator state, the counters, the
metrics logged so far, and the best weights so far where a stage looks for them; whole, not sharded,
so that any number of ranks can resume from it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_core.errors import ArtifactCorrupt, ArtifactNotFound, Preempted, StoreError
from rlhf_core.jobs import BaseJob
from rlhf_core.runtime.context import StageContext
from rlhf_core.runtime.stopping import stop
from rlhf_core.runtime.uploads import Uploader
from rlhf_core.store import Artifact, Store
from rlhf_core.training.strategy import Strategy

KIND = "checkpoint"
BEST = "best.safetensors"
LISTINGS = 3  # attempts to list checkpoints while another process deletes some


class Checkpointer:
    """Saves every n steps, keeps the newest k, and restores. All ranks call every method.

    Attributes:
        rate: factor on the learning rate, below 1 after a non-finite loss (see `on_nonfinite`).
    """

    def __init__(self, context: StageContext, strategy: Strategy, job: BaseJob) -> None:
        self.context, self.strategy, self.job = context, strategy, job
        self.rate = 1.0
        self._store = context.store.scoped(f"checkpoints/{context.key}")
        self._uploads = Uploader(self._publish)
        self._saved = 0  # step of the newest checkpoint of this process
        self._best = context.folder / BEST
        stop.seconds = job.placement().stop_timeout
        stop.uploading = lambda: not self._uploads.wait(0)
        stop.phase = "training"

    # ------------------------------------------------------------------ save

    def after_step(self, step: int, total: int, counters: dict[str, Any] | None = None) -> None:
        """Save every n steps and when the job is told to stop, but not after the last step.

        Args:
            step: finished steps, from 1.
            counters: JSON values of the training loop.

        Raises:
            Preempted: the job was told to stop; the checkpoint is in the store.
        """
        if step == total:
            return
        if step % self.job.placement().checkpoint_every == 0:
            self.save(step, counters or {})
        self.stop_if_asked(step, counters)

    def stop_if_asked(self, step: int, counters: dict[str, Any] | None = None) -> None:
        """Stop between two updates, while the state is that after `step` finished steps.

        Raises:
            Preempted: the job was told to stop, and the checkpoint is in the store.
        """
        if not self.strategy.group.any(stop.requested):
            return
        if step > self._saved:
            self.save(step, counters or {})
        stop.phase = "leaving"
        self._uploads.wait()
        self.strategy.group.barrier()  # ranks that left early would look like ranks that died
        raise Preempted(
            f"told to stop; the next attempt goes on from the checkpoint after step {step}"
            if step > 0
            else "told to stop before the first step"
        )

    def save(self, step: int, counters: dict[str, Any]) -> None:
        """Copy the state to this machine's disk, then publish it in the background (rank 0)."""
        weights = self.strategy.weights(keep=self.context.main)
        optimizer = self.strategy.optimizer_state(keep=self.context.main)
        generators = self.strategy.group.gather(torch.get_rng_state())
        self._saved = step
        if not self.context.main:
            return
        folder = self.context.folder / "checkpoint" / str(step)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        save_file(weights, folder / "weights.safetensors")
        save_file(optimizer, folder / "optimizer.safetensors")
        save_file(
            {f"rank{i}": state for i, state in enumerate(generators)}, folder / "rng.safetensors"
        )
        state = {"step": step, "counters": counters, "worked": self.context.worked}
        (folder / "state.json").write_text(json.dumps(state))
        if self.context.metrics_path.exists():
            shutil.copy(self.context.metrics_path, folder / "metrics.jsonl")
        if self._best.exists():  # never changed, only replaced
            try:
                os.link(self._best, folder / BEST)
            except OSError:  # a file system without links
                shutil.copy(self._best, folder / BEST)
        self._uploads.put(folder, step)

    def keep_best(self) -> None:
        """Have the weights as they are now in every checkpoint from now on, as the best ones."""
        weights = self.strategy.weights(keep=self.context.main)
        if self.context.main:
            new = self._best.with_suffix(".part")
            save_file(weights, new)
            new.replace(self._best)

    def best_weights(self) -> dict[str, Tensor]:
        """Those of the last `keep_best`, also of an earlier process. Rank 0 only."""
        return load_file(self._best)

    def _publish(self, folder: Path, step: int) -> None:
        self._store.publish(folder, kind=KIND, metadata={"step": step})
        for old in newest_first(self._store)[self.job.placement().keep_checkpoints :]:
            self._store.delete(old.digest, blobs=True)

    def settle(self, seconds: float) -> int | None:
        """Wait until the newest checkpoint is in the store, whichever rank sends it.

        Args:
            seconds: at most.

        Returns:
            Step of the newest one there, 0 without one; None when the store cannot be read.
        """
        end, found = time.monotonic() + seconds, None
        while True:
            with contextlib.suppress(StoreError):
                found = next((step_of(a) for s in self._sources() for a in newest_first(s)), 0)
            if time.monotonic() > end or (found is not None and found >= self._saved):
                return found
            time.sleep(0.2)

    # ------------------------------------------------------------------ restore

    def restore(self) -> tuple[int, dict[str, Any]]:
        """Load the newest complete checkpoint into the prepared strategy.

        Returns:
            Finished steps (0 without a checkpoint) and the loop's counters.
        """
        group, folder = self.strategy.group, self.context.folder / "resume"
        lowered = self.context.lowered = group.broadcast(self.lowered() if self.context.main else 0)
        for entry in lowered:
            self.rate *= entry["factor"]
        step = group.broadcast(self._fetch(folder) if self.context.main else 0)
        if self.context.main:  # what an earlier process of this job left
            for path in (self.context.metrics_path, self._best):
                path.unlink(missing_ok=True)
        if step == 0:
            return 0, {}
        if self.context.local_rank == 0 and not self.context.main:
            self._fetch_same(folder, step)  # the first rank of every further machine
        group.barrier()
        state = json.loads((folder / "state.json").read_text())
        self.context.worked_before = state.get("worked", 0.0)
        self.strategy.load_state(
            load_file(folder / "weights.safetensors"), load_file(folder / "optimizer.safetensors")
        )
        generators = load_file(folder / "rng.safetensors")
        if len(generators) == self.strategy.world_size:
            torch.set_rng_state(generators[f"rank{self.context.rank}"])
        group.barrier()
        if self.context.main:
            for path in (self.context.metrics_path, self._best):
                if (folder / path.name).exists():
                    shutil.copy(folder / path.name, path)
        group.barrier()
        if self.context.local_rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        rate = f", with the learning rate times {self.rate:g}" if lowered else ""
        self.context.log(f"going on from the checkpoint after step {step}{rate}")
        self._saved = step
        return step, state["counters"]

    def _sources(self) -> list[Store]:
        """Where checkpoints may be: the stage's own prefix, then that of an otherwise equal stage
        that fails where this one lowers its learning rate."""
        keys = dict.fromkeys((self.context.key, self.job.fail_fast_variant().key()))
        return [self.context.store.scoped(f"checkpoints/{key}") for key in keys]

    def _fetch(self, folder: Path, step: int | None = None) -> int:
        """Fetch the newest intact checkpoint (or that of a step); returns its step, 0 for none."""
        damaged: set[str] = set()
        for _ in range(LISTINGS):
            found = [(store, a) for store in self._sources() for a in newest_first(store)]
            for store, artifact in found:
                if step not in (None, step_of(artifact)) or artifact.digest in damaged:
                    continue
                shutil.rmtree(folder, ignore_errors=True)
                try:
                    store.fetch(artifact.digest, folder)
                except ArtifactNotFound:
                    break  # deleted since it was listed, by a process that has not ended yet
                except ArtifactCorrupt as error:
                    print(f"WARNING: checkpoint skipped: {error}", flush=True)
                    damaged.add(artifact.digest)
                    continue
                return step_of(artifact)
            else:
                return 0
        return 0

    def _fetch_same(self, folder: Path, step: int) -> None:
        """Fetch the checkpoint that rank 0 has chosen.

        Raises:
            StoreError: it has been deleted meanwhile, or is damaged.
        """
        if self._fetch(folder, step) != step:
            raise StoreError(
                f"the checkpoint after step {step}, from which rank 0 goes on, is gone from "
                f"{self._store.url} or damaged; the next attempt chooses again"
            )

    def weights_before(self, step: int) -> tuple[int, dict[str, Tensor]] | None:
        """The newest intact checkpoint after at most `step` steps: its step, and the trained
        weights by name. Rank 0 only; None when none is kept."""
        folder = self.context.folder / "before"
        for store in self._sources():
            for artifact in newest_first(store):
                if step_of(artifact) > step:
                    continue
                shutil.rmtree(folder, ignore_errors=True)
                try:
                    store.fetch(artifact.digest, folder)
                except (ArtifactNotFound, ArtifactCorrupt) as error:
                    print(f"WARNING: checkpoint skipped: {error}", flush=True)
                    continue
                weights = load_file(folder / "weights.safetensors")
                return step_of(artifact), weights
        return None

    # ------------------------------------------------------------------ lowering the learning rate

    def lowered(self) -> list[dict[str, Any]]:
        """Each lowering of the learning rate, oldest first: "step" (whose loss was not finite) and
        "factor"."""
        found = [self._store.read_record(path) for path in self._store.list_records("lowered/")]
        return [entry for entry in found if entry and entry.keys() >= {"step", "factor"}]

    def lower(self, step: int, factor: float) -> None:
        """Have the next attempt train with a lower rate. Any rank may call, all with equal
        arguments."""
        number = len(self.context.lowered)
        self._store.write_record(f"lowered/{number}.json", {"step": step, "factor": factor})

    # ------------------------------------------------------------------ end

    def finish(self) -> None:
        """Delete the checkpoints; call after the result is published."""
        if not self.context.main:
            return
        self._uploads.close()
        try:
            for artifact in newest_first(self._store):
                self._store.delete(artifact.digest, blobs=True)
            for path in self._store.list_records("lowered/"):
                self._store.delete_record(path)
        except StoreError as error:  # the result is safe, and the stage is done
            print(f"WARNING: checkpoints of a finished stage were left behind: {error}", flush=True)


def step_of(checkpoint: Artifact) -> int:
    """Finished steps of a checkpoint."""
    return int(checkpoint.metadata["step"])


def newest_first(store: Store) -> list[Artifact]:
    """The checkpoints in a stage's prefix of the store."""
    return sorted(store.list(KIND), key=step_of, reverse=True)
