"""The real ranks with something that goes wrong: `python -m tests.faults.ranks FOLDER/job.json`.

RLHF_TEST_FAULTS is a JSON list. Each fault has "what" (see `FAULTS`), and may have "rank" (empty:
every rank) and "update" (number of the optimizer step of this process before which it happens,
from 1; empty: every one). With "once", a path, it happens in one process of each rank only.
"where" is another place than the step (see `install`), of which those of a checkpoint may have
"save", the number of the checkpoint in this process.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from rlhf_core.runtime import rank as ranks
from rlhf_core.store import Store
from rlhf_core.training import checkpoint as checkpoints
from rlhf_core.training.checkpoint import Checkpointer
from rlhf_core.training.stored_checkpoints import newest_first
from rlhf_core.training.strategy import Strategy

plan: list[dict[str, Any]] = []
updates = saves = 0
checkpointer: Checkpointer | None = None


def wait_for_checkpoint() -> None:
    """A kill before the first checkpoint would prove nothing."""
    assert checkpointer is not None
    while not newest_first(checkpointer._store):
        time.sleep(0.02)


def kill(fault: dict[str, Any]) -> None:
    """Send SIGKILL or another signal to "rank" (this one), "agent" (torchrun) or "orchestrator";
    with "times", so often."""
    if fault.get("signal") is None:
        wait_for_checkpoint()
    agent = os.getppid()
    orchestrator = parent_of(parent_of(agent))  # of the fork server that forked the agent
    target = {"rank": os.getpid(), "agent": agent, "orchestrator": orchestrator}
    for number in range(fault.get("times", 1)):
        time.sleep(0.05 * (number > 0))
        os.kill(target[fault["target"]], fault.get("signal", signal.SIGKILL))
    if fault.get("signal") is None:
        time.sleep(2)  # the end reaches this rank meanwhile, or it is told to stop


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def sleep(fault: dict[str, Any]) -> None:
    """For ever, for some seconds, or until a file is there."""
    while "until" in fault and not Path(fault["until"]).exists():
        time.sleep(0.05)
    if "until" not in fault:
        time.sleep(fault.get("seconds", 1e6))


def hold(fault: dict[str, Any]) -> None:
    """Say by a file that this rank is here, and wait until the file is gone."""
    if fault.get("checkpoint"):
        wait_for_checkpoint()
    mark = Path(fault["at"])
    mark.touch()
    while mark.exists():
        time.sleep(0.05)


def memory(fault: dict[str, Any]) -> None:
    """An error of an allocator, for micro-batches above a size."""
    assert checkpointer is not None
    if checkpointer.job.resources.micro_batch_size > fault["above"]:
        kind = getattr(torch, fault["error"]) if hasattr(torch, fault["error"]) else MemoryError
        raise kind(fault.get("text", ""))


def limit(fault: dict[str, Any]) -> None:
    """Let this process have so many MiB more than it has now."""
    status = Path("/proc/self/status").read_text()
    now = int(status.split("VmData:")[1].split()[0]) * 1024
    most = now + fault["mib"] * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def grab(fault: dict[str, Any]) -> None:
    """Take so many MiB for real."""
    held.append(bytearray(os.urandom(2**20)) * fault["mib"])


held: list[bytearray] = []
FAULTS = {
    "kill": kill,
    "sleep": sleep,
    "hold": hold,
    "memory": memory,
    "limit": limit,
    "grab": grab,
}


def due(fault: dict[str, Any]) -> bool:
    """Whether it is this rank's and this update's turn."""
    rank = int(os.environ.get("RANK", "0"))
    if fault.get("rank", rank) != rank or fault.get("update", updates) != updates:
        return False
    if fault.get("save", saves) != saves:
        return False
    if "once" in fault:
        mark = Path(f"{fault['once']}-{rank}")
        if mark.exists():
            return False
        mark.touch()
    return True


def install() -> None:
    """Put the faults between the real parts."""
    plan[:] = json.loads(os.environ.get("RLHF_TEST_FAULTS", "[]"))
    backward, step, start = Strategy.backward, Strategy.step, Checkpointer.__init__

    def faulty_start(self: Checkpointer, *arguments: Any) -> None:
        global checkpointer
        start(self, *arguments)
        checkpointer = self
        happen("start")

    def faulty_backward(self: Strategy, loss: torch.Tensor) -> None:
        global updates
        updates += 1  # as if the update were done, until it is
        for fault in plan:
            if fault["what"] == "nan" and self._backend.param_groups[0]["lr"] > fault["above"]:
                loss = loss * float("nan") if due(fault) else loss
        happen("backward")
        updates -= 1
        backward(self, loss)

    def faulty_step(self: Strategy) -> float:
        global updates
        updates += 1
        happen("step")
        return step(self)

    def happen(where: str) -> None:
        for fault in plan:
            if fault["what"] in FAULTS and fault.get("where", "step") == where and due(fault):
                FAULTS[fault["what"]](fault)

    def around(owner: Any, name: str, before: str, after: str) -> None:
        """Have a function that saves a checkpoint pass two places where faults may happen."""
        call = getattr(owner, name)

        def faulty(*arguments: Any, **settings: Any) -> Any:
            global saves
            saves += before == "copied"
            happen(before)
            result = call(*arguments, **settings)
            happen(after)
            return result

        setattr(owner, name, faulty)

    around(checkpoints, "write_parts", "copied", "written")
    around(Store, "upload", "upload", "uploaded")
    around(Store, "publish_derived", "publish", "published")
    Checkpointer.__init__ = faulty_start  # type: ignore[method-assign]
    Strategy.backward, Strategy.step = faulty_backward, faulty_step  # type: ignore[method-assign]


preload = ranks.preload


def main(arguments: list[str]) -> int:
    """See `rlhf_core.__main__`."""
    install()
    return ranks.main(arguments)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
