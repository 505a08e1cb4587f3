"""An environment that notes each of its steps, and may end its rank in the middle of one."""

from __future__ import annotations

import importlib
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

from rlhf_core.environments.calculator import calculator
from rlhf_core.environments.make import Sums
from rlhf_core.environments.tools import FunctionTool, ToolSet
from rlhf_core.jobs import DataJob, GRPOJob, ImportModelJob, Resources
from rlhf_core.runtime.context import StageContext
from rlhf_core.runtime.rank import fast_paths_as_set, run_job
from rlhf_core.store import open_store
from tests.rlhf_core.environments.sums import make_model, write_prompts

FOLDER = "RLHF_TEST_TURNS"
_lock, _steps = threading.Lock(), 0


class Noted(Sums):
    """The calculator. `$RLHF_TEST_TURNS/steps.txt` gets a line for each step; the rank that makes
    step n is killed, once, where `kill.txt` says n."""

    def __init__(self) -> None:
        super().__init__(ToolSet([FunctionTool(calculator, 5.0)]), 1e-6)
        self.folder = Path(os.environ[FOLDER])

    def step(self, reply, ids):
        step = super().step(reply, ids)
        global _steps
        with _lock:
            _steps += 1
            line = {"step": f"{self._row['episode']}-{self._turn}", "reply": reply}
            with open(self.folder / "steps.txt", "a") as notes:
                notes.write(json.dumps(line) + "\n")
            order = self.folder / "kill.txt"
            if order.exists() and _steps == int(order.read_text()):
                order.unlink(missing_ok=True)
                if (self.folder / "alive").exists():
                    raise SystemExit("cut")
                os.kill(os.getpid(), signal.SIGKILL)
        return step


def attempt(job: Any, store: Any, key: str, folder: Path) -> Any:
    """Run or resume a stage in this process, which outlives a kill if the file `alive` is there."""
    global _steps
    _steps = 0
    folder.mkdir(parents=True, exist_ok=True)
    with fast_paths_as_set(job):
        return importlib.import_module(job.module).run(
            job, StageContext(store=store, key=key, folder=folder)
        )


def make_sums(folder: Path) -> dict[str, str]:
    """A store below a folder with a model that asks a calculator, and prompts; name -> digest."""
    store = open_store(f"file://{folder / 'store'}")

    def result(job: Any) -> str:
        place = folder / "jobs" / job.key()
        place.mkdir(parents=True)
        run_job(job, store, place)
        return str(json.loads((place / "result.json").read_text())["artifact"])

    model = result(ImportModelJob(source=str(make_model(folder / "sums", steps=60))))
    prompts = DataJob(
        purpose="prompts", source=str(write_prompts(folder / "sums.jsonl", 60, seed=7)),
        model=model, heldout_fraction=0.3, columns={"prompt": "prompt", "answer": "answer"},
    )  # fmt: skip
    return {"model": model, "prompts": result(prompts)}


def turns_job(inputs: dict[str, str], resources: dict[str, Any], **settings: Any) -> GRPOJob:
    """A few rollouts of episodes with two turns or so."""
    place = {"checkpoint_every": 1, "micro_batch_size": 4, "threads": 1, "device": "cpu"}
    environment = {"type": "python", "environment": "tests.faults.turns:Noted"}
    return GRPOJob(
        **inputs, resources=Resources(**(place | resources)),
        **({"steps": 4, "batch_size": 4, "group_size": 4, "max_new_tokens": 10,
            "learning_rate": 1e-3, "precision": "fp32", "epochs": 2, "min_length": None,
            "environment": environment | {"max_episode_tokens": 40},
            "rewards": ({"type": "environment"},)} | settings),
    )  # fmt: skip
