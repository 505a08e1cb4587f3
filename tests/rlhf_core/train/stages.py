"""Runs real stages on real ranks for the tests in this folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

from rlhf_core.context import StageContext
from rlhf_core.jobs import BaseJob
from rlhf_core.store import Artifact, Store, open_store
from tests.rlhf_core.torchrun import ROOT, free_port, run_ranks


class Stages:
    """A store with a folder for jobs; `run` puts jobs through torchrun as the launcher does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"file://{folder / 'store'}"
        self.store: Store = open_store(self.url)
        self.env = {"RLHF_STORE": self.url, "RLHF_HOME": str(folder / "home")}
        self._number = 0

    def write(self, job: BaseJob) -> Path:
        """A job folder with its job.json."""
        self._number += 1
        path = self.folder / "jobs" / f"{self._number:02d}-{job.algorithm}"  # type: ignore[attr-defined]
        path.mkdir(parents=True)
        (path / "job.json").write_text(job.model_dump_json())
        return path

    def run(self, *jobs: BaseJob, ranks: int = 1) -> list[Artifact]:
        """Run jobs one after another in the same processes."""
        folders = [self.write(job) for job in jobs]
        run_ranks(
            ranks, "rlhf_core", *(str(f / "job.json") for f in folders), module=True, env=self.env
        )
        return [self.result(f) for f in folders]

    def result(self, folder: Path) -> Artifact:
        return self.store.get(json.loads((folder / "result.json").read_text())["artifact"])

    def run_killed(self, job: BaseJob, ranks: int, after_step: int) -> int:
        """Start a job, SIGKILL all its processes once a step is logged; returns that step."""
        folder = self.write(job)
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
            "--master-addr", "127.0.0.1", "--master-port", str(free_port()),
            "-m", "rlhf_core", str(folder / "job.json"),
        ]  # fmt: skip
        environment = os.environ | self.env | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        log = (folder / "log.txt").open("w")
        process = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
        metrics = folder / "metrics.jsonl"
        checkpoints = self.store.scoped(f"checkpoints/{job.key()}")
        deadline = time.time() + 120
        try:
            while time.time() < deadline:
                lines = metrics.read_text().splitlines() if metrics.exists() else []
                if len(lines) >= after_step and checkpoints.list("checkpoint"):
                    break
                assert process.poll() is None, (folder / "log.txt").read_text()[-3000:]
                time.sleep(0.02)
            else:
                raise AssertionError("the job took no step in two minutes")
        finally:
            # The ranks ask the kernel to die with torchrun, so ending torchrun ends them too.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            log.close()
        assert self.store.stage_result(job.key()) is None, "it was to be killed before its end"
        return len(lines)

    def weights(self, artifact: Artifact) -> dict:
        return load_file(self.store.fetch(artifact.digest) / "model.safetensors")

    def metrics(self, artifact: Artifact) -> list[dict]:
        text = self.store.read_bytes(artifact.digest, "metrics.jsonl").decode()
        return [json.loads(line) for line in text.splitlines()]


def weight_hashes(artifact: Artifact) -> dict[str, str]:
    """sha256 of every weight file."""
    return {f.path: f.sha256 for f in artifact.files if f.path.endswith(".safetensors")}


def context_for(stages: Stages, job: BaseJob) -> StageContext:
    return StageContext(store=stages.store, key=job.key(), folder=stages.write(job))  # type: ignore[arg-type]
