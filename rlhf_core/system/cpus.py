"""How many CPU cores there are for this process, and torch's threads."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path


def set_threads() -> None:
    """Where torch was imported with another OMP_NUM_THREADS than this stage's. Not before a fork:
    it starts threads."""
    torch, threads = sys.modules.get("torch"), int(os.environ.get("OMP_NUM_THREADS", "0"))
    if torch is not None and threads and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def cpu_cores() -> int:
    """Cores that this process may use, with a container's quota in mind."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores
