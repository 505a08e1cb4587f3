"""A node's agent without ranks, for tests of what Slurm does to a job.

Node 0 counts its starts in STUB/starts. It trains: a step every tenth of a second, from the
checkpoint STUB/checkpoint, up to the number in STUB/steps; then the result is in the store. SIGTERM
saves a checkpoint and ends it as a real agent would. STUB/fail has a category to fail with.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

from rlhf_core.runtime.launches import (
    DONE,
    SIGNAL,
    STOPPED,
    NodeReport,
    exit_code,
    read_jobs,
    write_report,
)
from rlhf_core.store import open_store
from tasks.launchers.node_agent import _parser
from tasks.launchers.remote_output import progress_line

FOLDER = Path(os.environ["STUB"])


def number(name: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        return int((FOLDER / name).read_text())
    return 0


def main() -> int:
    options = _parser().parse_args()
    store = open_store(options.store)
    signals: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))
    own = {"node": options.node_rank, "host": socket.gethostname()}
    first = options.node_rank == 0

    def report(**more: object) -> None:
        write_report(store, options.launch, options.attempt, NodeReport(**own, **more))

    report()
    (FOLDER / f"pid-{options.node_rank}").write_text(str(os.getpid()))
    step = number("checkpoint")
    if first:
        (FOLDER / "starts").write_text(str(number("starts") + 1))
        print(f"starting at step {step}, attempt {options.attempt}", flush=True)
    while step < number("steps"):
        time.sleep(0.1)
        step += 1
        if first and step % 10 == 0:
            print(progress_line({"step": step, "total": number("steps")}), flush=True)
        if (FOLDER / "fail").exists():
            category = (FOLDER / "fail").read_text()
            report(state="failed", category=category, text="as planned", time=time.time())
            return exit_code(category)
        if signals:
            if first:
                (FOLDER / "checkpoint").write_text(str(step))
                print(f"checkpoint at step {step}", flush=True)
            report(state="failed", category="preempted", text="stopped", weight=SIGNAL)
            return STOPPED
    if first:
        _, [job] = read_jobs(store, options.launch)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "model.safetensors").write_bytes(b"weights")
            artifact = store.publish(Path(folder), kind=job.kind, metadata={"steps": step})
        store.commit_stage(job.key(), artifact)
    report(state="done")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
