"""One rank: `main([JOB.json, ..., "--cut", STEP, JOB.json, ...])`

The jobs after --cut end with an exception after that step, between two checkpoints, and are then
started again. What dies with a process is lost here as well: each start loads its own model and
optimizer. (tests/faults kills real processes.)
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rlhf_core.runtime.job_file import read_job
from rlhf_core.runtime.rank import run_job
from rlhf_core.store import open_store
from rlhf_core.training.checkpoint import Checkpointer


class Cut(Exception):
    """The end that was asked for."""


def cut_off(path: Path, step: int, store: Any) -> None:
    """Run a job up to a step."""
    go_on = Checkpointer.after_step

    def after_step(self: Checkpointer, done: int, total: int, counters: Any = None) -> None:
        go_on(self, done, total, counters)
        if done == step:
            self._uploads.wait()
            raise Cut

    Checkpointer.after_step = after_step  # type: ignore[method-assign]
    try:
        run_job(read_job(path), store, path.parent)
    except Cut:
        return
    finally:
        Checkpointer.after_step = go_on  # type: ignore[method-assign]
    raise SystemExit(f"{path} ended before step {step}")


def main(arguments: list[str]) -> None:
    store = open_store(os.environ["RLHF_STORE"])
    at = arguments.index("--cut")
    whole, step, cut = arguments[:at], int(arguments[at + 1]), arguments[at + 2 :]
    for name in cut:
        cut_off(Path(name), step, store)
    for name in [*whole, *cut]:
        run_job(read_job(Path(name)), store, Path(name).parent)
