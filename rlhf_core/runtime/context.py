"""What a running stage has besides its job: store, rank, job folder, metrics and publishing.

The contract between launcher and stage is a *job folder*:

    job.json         the job, written by the launcher
    metrics.jsonl    one line per step: step, total, time (s) and the stage's metrics (rank 0)
    samples.jsonl    one line per step: step and some samples (prompt, reply, score)
    result.json      {"artifact", "kind", "key"}: written when the artifact is in the store
    error-<rank>.json  {"category", "message", "time"}: why this rank failed

RLHF_STORE has the store's URL; the usual AWS variables have its credentials.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_core.errors import ConfigError
from rlhf_core.jobs import Job
from rlhf_core.runtime.stopping import stop
from rlhf_core.runtime.uploads import retry_while_unavailable
from rlhf_core.runtime.work import without_measurements, work
from rlhf_core.store import Artifact, Store


@dataclass
class StageContext:
    """Handed to every `run(job, context)`.

    Attributes:
        store: holds the inputs and gets the result.
        key: the job's stage key.
        folder: the job folder; scratch space that is deleted after the run.
        rank, world_size, local_rank: of this process.
        store_timeout: seconds for which publishing retries while the store is unavailable.
        lowered: see Checkpointer.lowered; part of the result's metadata.
        worked_before: seconds that earlier attempts worked up to the checkpoint that is resumed.
        started: seconds since 1970.
        closing: what the stage has to close: before its result is published, or after it fails.
    """

    store: Store
    key: str
    folder: Path
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    store_timeout: float = 900.0
    lowered: list[dict[str, Any]] = field(default_factory=list)
    worked_before: float = 0.0
    started: float = field(default_factory=time.time)
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, repr=False)
    _began: float = field(default_factory=time.monotonic, repr=False)
    _writer: Any = field(default=None, repr=False)
    _wandb_run: Any = field(default=None, repr=False)

    @classmethod
    def from_environment(cls, store: Store, job: Job, folder: Path) -> StageContext:
        """The rank that torchrun's variables name; a single rank without them."""
        return cls(
            store=store,
            key=job.key(),
            folder=folder,
            rank=int(os.environ.get("RANK", "0")),
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            store_timeout=job.placement().store_timeout,
        )

    @property
    def main(self) -> bool:
        """True on the one rank that writes."""
        return self.rank == 0

    @property
    def metrics_path(self) -> Path:
        return self.folder / "metrics.jsonl"

    def scratch(self, name: str) -> Path:
        """An empty folder of this rank's own."""
        path = self.folder / "scratch" / f"{name}-{self.rank}"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def log(self, message: str) -> None:
        """Print one line; rank 0 only, a no-op elsewhere."""
        if self.main:
            print(message, flush=True)

    def log_metrics(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Append one step to metrics.jsonl and TensorBoard; rank 0 only, a no-op elsewhere.

        Args:
            step: finished steps, from 1.
            total: steps that the stage will take.
            metrics: name -> number. Those that `work.is_measurement` tells stay out of the
                artifact.
        """
        if not self.main:
            return
        line = {"step": step, "total": total, "time": round(time.time(), 3), **metrics}
        with self.metrics_path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._tensorboard(step, metrics)
        if os.environ.get("RLHF_WANDB_PROJECT"):
            self._wandb(os.environ["RLHF_WANDB_PROJECT"], step, metrics)
        if sys.stdout.isatty() or step == 1 or step == total or step % max(1, total // 20) == 0:
            shown = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items())
            print(f"step {step}/{total}  {shown}", flush=True)

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Append prompt, reply and score of some samples to samples.jsonl; rank 0 only.

        Args:
            step: finished steps, from 1.
            samples: each {"prompt": str, "reply": str, "score": float}.
        """
        if self.main:
            line = {"step": step, "samples": list(samples)}
            with (self.folder / "samples.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _tensorboard(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._writer is None:
            self._writer = open_event_file(self.folder / "tensorboard", self.log)
        if not self._writer:
            return
        writer, event, summary = self._writer
        values = [summary.Value(tag=k, simple_value=float(v)) for k, v in metrics.items()]
        writer.add_event(event(step=step, wall_time=time.time(), summary=summary(value=values)))

    def _wandb(self, project: str, step: int, metrics: Mapping[str, float]) -> None:
        """Log to Weights & Biases, if RLHF_WANDB_PROJECT is set.

        Without an API key it logs offline, so that it never prompts.

        Raises:
            ConfigError: the package is not installed.
        """
        if self._wandb_run is None:
            try:
                import wandb
            except ImportError as error:
                raise ConfigError(
                    "RLHF_WANDB_PROJECT is set, but the package wandb is not installed: "
                    'run pip install "rlhf-pipeline[wandb]", or unset the variable.'
                ) from error
            mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
            self._wandb_run = wandb.init(
                project=project, name=self.folder.name, id=self.key[:16], resume="allow",
                mode=mode, dir=str(self.folder), settings=wandb.Settings(silent=True),
            )  # fmt: skip
        self._wandb_run.log(dict(metrics), step=step)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The steps logged so far, oldest first."""
        if not self.metrics_path.exists():
            return []
        return [json.loads(line) for line in self.metrics_path.read_text().splitlines() if line]

    @property
    def worked(self) -> float:
        """Seconds of work on the result so far."""
        return self.worked_before + time.monotonic() - self._began

    def publish(
        self,
        job: Job,
        folder: Path,
        metadata: Mapping[str, Any] | None = None,
        parents: Sequence[str] | None = None,
        kind: str | None = None,
        bind: bool = True,
    ) -> Artifact:
        """Publish the stage's result and bind it to the stage key. Call on rank 0 only.

        The job and metrics.jsonl are stored with the artifact, so that the stage can be repeated
        and its curves drawn later. Times and throughputs go to the stage's record, see `work`.

        Args:
            bind: False publishes an artifact that is not the stage's result.

        Raises:
            StoreError: publishing failed, after retries; no partial artifact is visible.
        """
        stop.phase = "leaving"
        if self._writer:
            self._writer[0].flush()
        lines = self.read_metrics()
        if lines:
            kept = [json.dumps(without_measurements(line)) + "\n" for line in lines]
            (folder / "metrics.jsonl").write_text("".join(kept))
        described = {
            "algorithm": job.algorithm,
            "job": job.model_dump(mode="json"),
            "key": self.key,
            **({"learning_rate_lowered": self.lowered} if self.lowered else {}),
            **(metadata or {}),
        }
        if "metrics" in described:
            described["metrics"] = without_measurements(described["metrics"])
        made_of = list(job.inputs().values()) if parents is None else list(parents)

        def send() -> Artifact:
            artifact = self.store.publish(
                folder, kind=kind or job.kind, metadata=described, parents=made_of
            )
            if not bind:
                return artifact
            made = work(self.started, time.time(), self.worked, self.world_size, lines)
            return self.store.commit_stage(self.key, artifact, made)

        return retry_while_unavailable(send, "the result", self.store_timeout)


def open_event_file(folder: Path, log: Callable[[str], None]) -> tuple[Any, ...]:
    """A writer of TensorBoard's event files with its two message types; () without TensorBoard.

    This is the writer without torch.utils.tensorboard, whose import costs two seconds.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError:
        log("the package tensorboard is not installed: metrics go to metrics.jsonl only")
        return ()
    return EventFileWriter(str(folder)), Event, Summary
