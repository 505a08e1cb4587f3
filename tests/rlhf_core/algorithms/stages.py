"""Runs real stages on real ranks for the tests in this folder."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from rlhf_core.jobs import BaseJob
from rlhf_core.runtime.context import StageContext
from rlhf_core.runtime.rank import fast_paths_as_set
from rlhf_core.runtime.work import without_measurements
from rlhf_core.store import Artifact, Store, open_store
from tests.rlhf_core.torchrun import run_ranks


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
        files = [str(f / "job.json") for f in folders]
        run_ranks(ranks, "rlhf_core.__main__", *files, env=self.env)
        return [self.result(f) for f in folders]

    def run_here(self, job: BaseJob, key: str) -> tuple[dict[str, str], list[dict]]:
        """Train in this process, under a key of its own: weight hashes and metrics.

        Monkeypatches of the training code count.
        """
        artifact = self.train_here(job, key)
        return weight_hashes(artifact), self.metrics(artifact)

    def train_here(self, job: BaseJob, key: str, *, resume: bool = False) -> Artifact:
        """The result of a job in this process, under a key of its own."""
        folder = self.folder / "here" / key
        folder.mkdir(parents=True, exist_ok=resume)
        context = StageContext(store=self.store, key=key, folder=folder)
        with fast_paths_as_set(job):
            return importlib.import_module(job.module).run(job, context)

    def result(self, folder: Path) -> Artifact:
        return self.store.get(json.loads((folder / "result.json").read_text())["artifact"])

    def weights(self, artifact: Artifact) -> dict:
        return load_file(self.store.fetch(artifact.digest) / "model.safetensors")

    def metrics(self, artifact: Artifact) -> list[dict]:
        text = self.store.read_bytes(artifact.digest, "metrics.jsonl").decode()
        return [json.loads(line) for line in text.splitlines()]


def weight_hashes(artifact: Artifact) -> dict[str, str]:
    """sha256 of every weight file."""
    return {f.path: f.sha256 for f in artifact.files if f.path.endswith(".safetensors")}


@dataclass
class Run:
    """What came of one job of a plan."""

    store: Store
    folder: Path
    job: BaseJob

    @property
    def artifact(self):
        return self.store.stage_result(self.job.key())

    @property
    def metrics(self):
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [without_measurements(json.loads(line)) for line in lines]

    @property
    def said(self):
        return (self.folder / "said.txt").read_text()

    def weights(self):
        found = load_file(self.store.fetch(self.artifact.digest) / "model.safetensors")
        return {name: value.numpy() for name, value in found.items()}


def copy_inputs(stages, store, digests):
    other = open_store(f"file://{store}")
    for kind in ("model", "reward_model", "dataset"):
        for artifact in stages.store.list(kind):
            if artifact.digest in digests:
                other.publish(
                    stages.store.fetch(artifact.digest), kind=kind,
                    metadata=artifact.metadata, parents=artifact.parents,
                )  # fmt: skip


def run_plan_in(stages, home, inputs, ranks, entries):
    """Jobs by name, each with what `online_ranks` is to do with it; all in one start of the ranks.

    Every job has a store with the inputs alone, `where` names one that two jobs share.

    Args:
        home: folder of the stores and jobs. inputs: digests.
        entries: name -> job, and what `online_ranks` is to do with it.
    """
    runs, plan = {}, []
    for name, (job, what) in entries.items():
        store = home / f"{what.pop('where', name)}-{ranks}"
        if not store.exists():
            copy_inputs(stages, store, inputs)
        runs[name] = Run(open_store(f"file://{store}"), home / f"{name}-{ranks}-job", job)
        runs[name].folder.mkdir()
        plan.append(
            {"job": json.loads(job.model_dump_json()), "store": f"file://{store}",
             "folder": str(runs[name].folder), **what}
        )  # fmt: skip
    path = home / f"plan-{ranks}.json"
    path.write_text(json.dumps(plan))
    run_ranks(ranks, "tests.rlhf_core.algorithms.online_ranks", str(path), env=stages.env)
    return runs
