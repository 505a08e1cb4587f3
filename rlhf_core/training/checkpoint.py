"""Checkpoints: the full training state in the store, and resuming from the newest one.

A checkpoint is an artifact in the stage's own prefix of the store (`checkpoints/<stage key>/`), so
that its blobs can be deleted without checking whether other artifacts use them. Its files:

    part-<rank>.safetensors   the rank's part of the trained weights (fp32 masters) and of AdamW's
                              states: some elements of each flattened tensor, see `sharding.parts`
    index.json                the shape of each tensor, and where its parts are
    state.json                step, and the loop's counters
    rng.safetensors           each rank's generator state
    metrics.jsonl             what was logged so far
    best.safetensors          the best weights so far, where a stage looks for them
    rollout*.safetensors      replies that were sampled ahead, see `online.ahead`

Each rank copies its part to the host's memory, writes and uploads it in the background; when all
have, the first rank writes the manifest. Any number of ranks resumes, under any strategy. Earlier
versions had whole tensors in weights.safetensors and optimizer.safetensors, which are still read.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_core.errors import ArtifactCorrupt, ArtifactNotFound, Preempted, StoreError
from rlhf_core.jobs import BaseJob
from rlhf_core.runtime.context import StageContext
from rlhf_core.runtime.stopping import stop
from rlhf_core.runtime.uploads import Upload, Uploader
from rlhf_core.store import FileEntry, Store
from rlhf_core.training.sharding.parts import (
    Index,
    Saved,
    index_parts,
    merge,
    to_host,
    to_json,
    write_parts,
)
from rlhf_core.training.stored_checkpoints import (
    INDEX,
    KIND,
    fetch_parts,
    newest_first,
    open_saved,
    step_of,
)
from rlhf_core.training.strategy import Strategy

BEST = "best.safetensors"
AHEAD = "rollout*.safetensors"
LISTINGS = 3  # attempts to list checkpoints while another process deletes some


class Checkpointer:
    """Saves every n steps, keeps the newest k, and restores. All ranks call every method.

    Attributes:
        rate: factor on the learning rate, below 1 after a non-finite loss (see `on_nonfinite`).
        beside: called on rank 0 with the finished steps; gives what writes further files into a
            checkpoint's folder, in the background.
        ahead: folder that has those files of the checkpoint that is resumed.
    """

    def __init__(self, context: StageContext, strategy: Strategy, job: BaseJob) -> None:
        self.context, self.strategy, self.job = context, strategy, job
        self.rate = 1.0
        self._store = context.store.scoped(f"checkpoints/{context.key}")
        self._uploads = Uploader(strategy.group.gather_beside(), context.main)
        self._saved = 0  # step of the newest checkpoint of this process
        self._due = False  # a checkpoint, which waits until the one before is stored
        self._best = context.folder / BEST
        self.beside: Callable[[int], Callable[[Path], None]] | None = None
        self.ahead = context.folder / "ahead"
        stop.seconds = job.placement().stop_timeout
        stop.uploading = lambda: self._uploads.busy
        stop.phase = "training"

    # ------------------------------------------------------------------ save

    def after_step(self, step: int, total: int, counters: dict[str, Any] | None = None) -> None:
        """Save every n steps and when the job is told to stop, but not after the last step. While
        an earlier checkpoint is on its way to the store, the next one waits, unless that fails.

        Args:
            step: finished steps, from 1.
            counters: JSON values of the training loop.

        Raises:
            Preempted: the job was told to stop; the checkpoint is in the store.
        """
        if step == total:
            return
        if step % self.job.placement().checkpoint_every == 0:
            self._due = True
            self._uploads.wait_a_moment()
        if self._due and not self.strategy.group.any(not self._uploads.ready):
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
        """Copy this rank's part to the host's memory; the rest happens in the background."""
        self._uploads.wait_until_ready()
        parts = to_host(self.strategy.state())
        generators = self.strategy.group.gather(torch.get_rng_state())
        self._saved, self._due = step, False
        folder = self.context.folder / "checkpoint" / f"{step}-rank{self.context.rank}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        more: list[Callable[[Path], None]] = []
        if self.context.main:
            self._write_small_files(folder, step, counters, generators)
            more += [self.beside(step)] if self.beside is not None else []
        file = folder / f"part-{self.context.rank}.safetensors"
        index = index_parts(parts, file.name)

        def send() -> tuple[list[FileEntry], Index]:
            if parts:
                write_parts(parts, file)
                parts.clear()  # the memory
            while more:
                more.pop()(folder)
            return self._store.upload({path.name: path for path in folder.iterdir()}), index

        self._uploads.put(Upload(step, folder, send, partial(self._publish, step)))

    def _write_small_files(
        self, folder: Path, step: int, counters: dict[str, Any], generators: list[Tensor]
    ) -> None:
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

    def _publish(self, step: int, sent: list[tuple[list[FileEntry], Index]]) -> None:
        """Make a checkpoint of what all ranks have sent; delete old ones."""
        index = json.dumps(to_json(merge(parts for _, parts in sent))).encode()
        files = {entry.path: entry for entries, _ in sent for entry in entries}
        self._store.publish_derived(
            kind=KIND, files={**files, INDEX: index}, metadata={"step": step}
        )
        for old in newest_first(self._store)[self.job.placement().keep_checkpoints :]:
            self._store.delete(old.digest, blobs=True)

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
        step, saved = self._fetch_newest(folder)
        if self.context.main:  # what an earlier process of this job left
            for path in (self.context.metrics_path, self._best):
                path.unlink(missing_ok=True)
            shutil.rmtree(self.ahead, ignore_errors=True)
        if saved is None:
            return 0, {}
        state = json.loads((folder / "state.json").read_text())
        self.context.worked_before = state.get("worked", 0.0)
        self.strategy.load_state(saved)
        generators = load_file(folder / "rng.safetensors")
        if len(generators) == self.strategy.world_size:
            torch.set_rng_state(generators[f"rank{self.context.rank}"])
        group.barrier()
        if self.context.main:
            for path in (self.context.metrics_path, self._best):
                if (folder / path.name).exists():
                    shutil.copy(folder / path.name, path)
            self.ahead.mkdir()
            for path in folder.glob(AHEAD):
                shutil.move(path, self.ahead)
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

    def _fetch_newest(self, folder: Path) -> tuple[int, Saved | None]:
        """Fetch what this machine's ranks need of the newest intact checkpoint; its step (0 without
        one) and its tensors."""
        group, damaged = self.strategy.group, set()
        for _ in range(LISTINGS):
            found = [(i, a) for i, s in enumerate(self._sources()) for a in newest_first(s)]
            for number, artifact in group.broadcast(found if self.context.main else None):
                if artifact.digest in damaged:
                    continue
                store = self._sources()[number]
                saved = fetch_parts(store, artifact, folder, self.context, self.strategy)
                if isinstance(saved, Saved):
                    return step_of(artifact), saved
                if isinstance(saved, ArtifactNotFound):
                    break  # deleted since it was listed, by a process that has not ended yet
                self.context.log(f"WARNING: checkpoint skipped: {saved}")
                damaged.add(artifact.digest)
            else:
                return 0, None
        return 0, None

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
                saved = open_saved(folder)
                names = (name for name in saved.index if "|" not in name)
                return step_of(artifact), {name: saved.whole(name) for name in names}
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
        """Delete the checkpoints; every rank calls, rank 0 after the result is published."""
        if not self.context.main:
            self._uploads.wait()  # until rank 0 closes
            return
        self._uploads.close()
        try:
            for artifact in newest_first(self._store):
                self._store.delete(artifact.digest, blobs=True)
            for path in self._store.list_records("lowered/"):
                self._store.delete_record(path)
        except StoreError as error:  # the result is safe, and the stage is done
            print(f"WARNING: checkpoints of a finished stage were left behind: {error}", flush=True)
