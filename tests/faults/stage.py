"""A small stage in a store of its own, run by a real orchestrator process that may be killed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from safetensors.numpy import load_file

from rlhf_core.jobs import (
    BaseJob,
    DataJob,
    DPOJob,
    GRPOJob,
    ImportModelJob,
    KTOJob,
    ORPOJob,
    PPOJob,
    ReinforcePPJob,
    Resources,
    RewardJob,
    RLOOJob,
    SFTJob,
    SimPOJob,
)
from rlhf_core.store import Artifact, Store, open_store
from tests import forked
from tests.rlhf_core.torchrun import ROOT

WORDS = ("apple", "river", "stone", "cloud", "green", "seven", "music", "paper")

# Where the tests run each algorithm; `make chaos` has the rest.
PLACEMENT: dict[str, dict[str, Any]] = {
    "sft": {"ranks": 2, "strategy": "zero2"},
    "ppo": {"ranks": 2, "strategy": "ddp"},
    "reward": {"ranks": 1, "strategy": "zero2"},
}
PREFERENCE: dict[str, Any] = {"dpo": DPOJob, "simpo": SimPOJob, "orpo": ORPOJob, "kto": KTOJob}


def make_inputs(folder: Path) -> dict[str, str]:
    """A store below a folder with a tiny model, a reward model and data; name -> digest."""
    from rlhf_core.models.loading import new_scalar_model
    from rlhf_core.models.saving import save_scalar_model
    from rlhf_core.runtime.rank import run_job

    store = open_store(f"file://{folder / 'store'}")

    def result(job: Any) -> str:
        place = folder / "jobs" / job.key()
        place.mkdir(parents=True)
        run_job(job, store, place)
        return str(json.loads((place / "result.json").read_text())["artifact"])

    found = {"model": result(ImportModelJob(source="random:llama"))}
    rows = []
    for i in range(80):
        words = [WORDS[(i * k) % len(WORDS)] for k in range(1, 3 + i % 5)]
        rows.append((f"Say {' '.join(words)} number {i}", " ".join(reversed(words))))
    files = {
        "sft": [{"prompt": p, "completion": c} for p, c in rows],
        "preference": [{"prompt": p, "chosen": f"yes {c}", "rejected": f"no {c}"} for p, c in rows],
        "prompts": [{"prompt": p} for p, _ in rows],
    }
    for purpose, lines in files.items():
        path = folder / f"{purpose}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        found[purpose] = result(
            DataJob(purpose=purpose, source=str(path), model=found["model"], heldout_fraction=0.2)
        )
    rows = [{"prompt": f"Tell {i}", "completion": " ".join(WORDS) * 16} for i in range(64)]
    (folder / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found["long"] = result(
        DataJob(
            purpose="sft", source=str(folder / "long.jsonl"), model=found["model"],
            max_length=1024, heldout_fraction=0.1, seed=1,
        )
    )  # fmt: skip
    source, scalar = store.fetch(found["model"]), folder / "scalar"
    scalar.mkdir()
    module = new_scalar_model(source, 0)
    module.mean, module.std = 0.0, 1.0
    save_scalar_model(module, scalar, source)
    found["reward"] = store.publish(scalar, kind="reward_model").digest
    return found


def make_job(
    inputs: dict[str, str], algorithm: str, resources: dict[str, Any], **settings: Any
) -> Any:
    """A job of a few dozen updates in fp32."""
    place = Resources(
        **(
            {"checkpoint_every": 2, "micro_batch_size": 2, "threads": 1, "device": "cpu"}
            | resources
        )
    )
    common = {
        "model": inputs["model"], "learning_rate": 1e-3, "warmup_fraction": 0.1, "batch_size": 8,
        "precision": "fp32", "resources": place,
    }  # fmt: skip
    if algorithm == "sft":
        return SFTJob(data=inputs["sft"], **({"max_steps": 12, "epochs": 60} | common | settings))
    if algorithm == "reward":
        return RewardJob(
            data=inputs["preference"],
            **({"max_steps": 12, "epochs": 60, "max_new_tokens": 4} | common | settings),
        )
    if algorithm in PREFERENCE:  # KTO takes the pairs apart
        given = {"max_steps": 12, "epochs": 60} | common | settings
        return PREFERENCE[algorithm](data=inputs["preference"], **given)
    common |= {"steps": 5, "max_new_tokens": 6, "prompts": inputs["prompts"]}
    common["reward_model"] = inputs["reward"]
    if algorithm == "ppo":
        return PPOJob(**({"ppo_epochs": 2} | common | settings))
    kinds = {"grpo": GRPOJob, "rloo": RLOOJob, "reinforce_pp": ReinforcePPJob}
    groups = {} if algorithm == "reinforce_pp" else {"batch_size": 4, "group_size": 2}
    return kinds[algorithm](**({"epochs": 2} | common | groups | settings))


class Place:
    """A copy of a store, in which one stage is run by orchestrators one after another."""

    def __init__(self, source: Path, folder: Path, url: str = "") -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        if not url:
            shutil.copytree(source / "store", folder / "store")
        self.url = url or f"file://{folder / 'store'}"
        self.store: Store = open_store(self.url)
        self.attempts = 0
        self.sessions: set[int] = set()  # each orchestrator leads one; all that it starts is in it

    def start(
        self,
        job: BaseJob | Sequence[BaseJob],
        faults: Sequence[dict[str, Any]] = (),
        within: Path | None = None,
        **env: str,
    ) -> forked.Process:
        """An orchestrator process; its attempt's folder is `self.attempt`.

        Args:
            within: folder of a control group for it and its children.
        """
        self.attempts += 1
        self.attempt.mkdir()
        files = []
        for i, one in enumerate([job] if isinstance(job, BaseJob) else job):
            files.append(str(self.folder / f"job-{i}.json"))
            Path(files[-1]).write_text(one.model_dump_json())
        environment = {
            **os.environ, "RLHF_HOME": str(self.folder / "home"), "PYTHONPATH": str(ROOT),
            "RLHF_TEST_FAULTS": json.dumps(list(faults)), **env,
        }  # fmt: skip
        process = forked.start(
            "-m", "tests.faults.orchestrator", self.url, str(self.attempt), *files,
            cwd=ROOT, env=environment, needs=forked.MODELS, output=self.attempt / "out.txt",
            cgroup=within,
        )  # fmt: skip
        self.sessions.add(process.pid)
        return process

    def run(
        self,
        job: BaseJob | Sequence[BaseJob],
        faults: Sequence[dict[str, Any]] = (),
        within: Path | None = None,
        **env: str,
    ) -> str:
        """Run to the end of all processes; what the orchestrator said."""
        process = self.start(job, faults, within, **env)
        try:
            process.wait(200)
        finally:
            end(process)
        self.wait_for_quiet()
        return self.said()

    @property
    def attempt(self) -> Path:
        return self.folder / f"attempt-{self.attempts}"

    def said(self) -> str:
        return (self.attempt / "out.txt").read_text()

    def log(self) -> str:
        """Everything that the ranks said."""
        path = self.attempt / "log.txt"
        return path.read_text() if path.exists() else ""

    def steps(self) -> int:
        """Steps that the attempt has logged."""
        path = self.attempt / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def processes(self) -> list[psutil.Process]:
        """The ranks, agents and templates of this place that live, whoever started them."""
        found = []
        for process in psutil.process_iter(["status"]):
            with contextlib.suppress(ProcessLookupError):
                if (
                    process.info["status"] != psutil.STATUS_ZOMBIE
                    and os.getsid(process.pid) in self.sessions
                ):
                    found.append(process)
        return found

    def wait_for_quiet(self, seconds: float = 40) -> float:
        """Wait until no process of this place is left; how long it took."""
        began = time.monotonic()
        while left := self.processes():
            assert time.monotonic() - began < seconds, f"still there: {left}"
            time.sleep(0.05)
        return time.monotonic() - began

    def result(self, job: BaseJob) -> Artifact:
        artifact = self.store.stage_result(job.key())
        assert artifact is not None, self.said() + self.log()[-3000:]
        return artifact

    def checkpoints(self, job: BaseJob) -> list[int]:
        found = self.store.scoped(f"checkpoints/{job.key()}").list("checkpoint")
        return sorted(int(a.metadata["step"]) for a in found)


def end(process: forked.Process) -> None:
    """An orchestrator that a test has left behind, with its family."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def largest_difference(
    place: Place, artifact: Artifact, other_place: Place, other: Artifact
) -> float:
    """Between two models' weights, element by element."""
    first, second = (
        load_file(
            p.store.fetch(a.digest, p.folder / f"weights-{a.digest[:12]}") / "model.safetensors"
        )
        for p, a in ((place, artifact), (other_place, other))
    )
    assert first.keys() == second.keys()
    return max(float(np.abs(first[name] - second[name]).max()) for name in first)
