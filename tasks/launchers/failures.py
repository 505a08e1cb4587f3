"""Diagnoses a failed process group: from error files, exit codes and torchrun's output."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf_core.errors import JobFailed
from rlhf_core.runtime.launches import CONSEQUENCE, REASON, SIGNAL
from rlhf_core.runtime.stopping import PEER_LOST
from rlhf_core.system.secrets import redact

# Name of the Prefect state of a failed stage and its pipeline, by category.
STATE_NAMES = {
    "config": "ConfigurationError",
    "data": "DataError",
    "model": "ModelError",
    "store": "StoreUnavailable",
    "not_found": "ArtifactMissing",
    "oom": "OutOfMemory",
    "memory": "MemoryTooSmall",
    "training": "TrainingFailed",
    "nonfinite": "NonFiniteLoss",
    "rate_lowered": "LearningRateLowered",
    "collapse": "PolicyCollapsed",
    "judge": "JudgeFailed",
    "gate": "GateFailed",
    "reward_hacked": "RewardHacked",
    "queue": "NoFreeSlot",
    "lost": "ProcessLost",
    "hang": "ProcessHung",
    "preempted": "Preempted",
    "internal": "InternalError",
}
# torchrun: "failed (exitcode: -9) local_rank: 1 (pid: 4242) of binary: ..."
RANK_FAILED = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)")
# torchrun's summary: "  rank      : 1 (local_rank: 1)", then "  exitcode  : -9 (pid: 4242) ..."
SUMMARY_RANK = re.compile(r"^\s*rank\s+: (\d+) ")
SUMMARY_EXIT = re.compile(r"^\s*exitcode\s+: (-?\d+) ")
# torchrun, when it has got a signal itself: "Received SIGTERM death signal, shutting down workers"
STOPPED = re.compile(r"Received \S+ death signal|got signal: (2|15)$")


def state_name(category: str) -> str:
    """Name of the Prefect state of a flow run that failed for this reason."""
    return STATE_NAMES.get(category, "Failed")


def category_of(name: str | None) -> str:
    """The reverse of `state_name`."""
    return next((category for category, n in STATE_NAMES.items() if n == name), "internal")


class DeadRank:
    """Finds in torchrun's output which rank died first.

    torchrun names the exit that it *noticed* first, which may be that of a rank that failed because
    another was killed. Its summary lists all ranks: there a signal takes precedence over an exit
    code, except SIGTERM, which torchrun itself sends to the other ranks.

    Attributes:
        found: (rank, exit code), or None.
        stopped: whether torchrun got a signal to stop.
    """

    def __init__(self) -> None:
        self.found: tuple[int, int] | None = None
        self.stopped = False
        self._rank: int | None = None

    def feed(self, line: str) -> None:
        """Process one line of output."""
        self.stopped = self.stopped or STOPPED.search(line) is not None
        if self.found is None:
            if match := RANK_FAILED.search(line):
                self.found = (int(match[2]), int(match[1]))
        elif match := SUMMARY_RANK.match(line):
            self._rank = int(match[1])
        elif (match := SUMMARY_EXIT.match(line)) and self._rank is not None:
            code = int(match[1])
            if code < 0 and code != -signal.SIGTERM and self.found[1] >= 0:
                self.found = (self._rank, code)


def read_errors(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """The ranks' error files, oldest first, each with its `rank`."""
    errors = []
    for folder in folders:
        for path in folder.glob("error-*.json"):
            try:
                error = json.loads(path.read_text())
            except (OSError, ValueError):
                continue  # cut off by a kill; the exit code has the reason
            errors.append({**error, "rank": path.stem.removeprefix("error-")})
    return sorted(errors, key=_time)


class RanksFailed(JobFailed):
    """The ranks of this machine have left no result.

    Attributes:
        text: the reason alone.
        time: of the failure, seconds since 1970.
        weight: see `rlhf_core.runtime.launches`.
    """

    def __init__(self, message: str, category: str, text: str, time: float, weight: int) -> None:
        super().__init__(message, category)
        self.text, self.time, self.weight = text, time, weight


def diagnose(
    name: str,
    folders: Iterable[Path],
    returncode: int,
    dead_rank: tuple[int, int] | None,
    log: Path,
    *,
    stopped: bool = False,
    out_of_memory: str = "",
) -> RanksFailed:
    """The failure as one message, which ends with the log's path.

    Args:
        dead_rank: (rank, exit code) of the rank that died first, if torchrun named one.
        stopped: torchrun got a signal to stop that this process did not send.
        out_of_memory: evidence that the kernel has killed a process for lack of memory.
    """
    errors = read_errors(folders)
    real = [e for e in errors if e["category"] != "internal"]
    own = [e for e in errors if e["category"] == "internal" and not PEER_LOST.search(e["message"])]
    killed = dead_rank is not None and dead_rank[1] < 0
    by_kernel = bool(out_of_memory) and -signal.SIGKILL in (returncode, (dead_rank or (0, 0))[1])
    when, weight = time.time(), REASON
    if by_kernel:
        who = f"rank {dead_rank[0]}" if killed and dead_rank is not None else "the process"
        category, text = "oom", f"{who} was killed by the kernel for lack of memory{out_of_memory}"
    elif real:
        category, text, when = real[0]["category"], real[0]["message"], _time(real[0])
    elif stopped:
        category, text = "preempted", "its processes got a signal to stop"
    elif killed and dead_rank is not None:
        category, text = "lost", f"rank {dead_rank[0]} {_signal(-dead_rank[1])}"
    elif own:
        category, text = "internal", f"rank {own[0]['rank']}: {own[0]['message']}"
        when = _time(own[0])
    elif returncode < 0:
        category, text = "lost", f"the process {_signal(-returncode)}"
    elif errors:
        category, text = "lost", f"rank {errors[0]['rank']} lost the others: {errors[0]['message']}"
        when, weight = _time(errors[0]), CONSEQUENCE
    else:
        code = dead_rank[1] if dead_rank else returncode
        category, text = "internal", f"ended with exit code {code} and without a message"
    if category == "preempted":
        weight = SIGNAL
    text = shorten(redact(text))
    return RanksFailed(f"{name} failed: {text}\nFull log: {log}", category, text, when, weight)


def _time(error: dict[str, Any]) -> float:
    return float(error.get("time", 0))


def _signal(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    if number == signal.SIGKILL:
        return f"was killed by {name} (by hand, a scheduler, or a machine that ran out of memory)"
    return f"was killed by {name}"


def shorten(text: str, limit: int = 1500) -> str:
    """Cut a long text at its end: messages become part of a Prefect state."""
    return text if len(text) <= limit else text[: limit - 4].rstrip() + " ..."
