"""CPU cores that this process may use, and torch's number of threads."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from rlhf_core.system.cgroups import CGROUP, PROC, group_folders


def set_threads() -> None:
    """Give torch as many threads as OMP_NUM_THREADS says, if it was imported with another value.

    Not before a fork: it starts threads.
    """
    torch, threads = sys.modules.get("torch"), int(os.environ.get("OMP_NUM_THREADS", "0"))
    if torch is not None and threads and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def limit_threads() -> None:
    """Keep libraries that are imported later from starting a thread for each core of the machine in
    a container that may use a few: torch, NumPy and Arrow see its affinity mask, not its quota.

    For processes that get no OMP_NUM_THREADS from a launcher; one that is set stays.
    """
    cores = cpu_cores()
    if cores < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))


def cpu_cores(proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """CPU cores that this process may use: its affinity mask, cut to its control groups' quotas.

    A fractional quota is rounded up, as the JVM and Go do it: with 1.5 CPUs two threads are faster
    than one, and are throttled for a quarter of the time. At least 1.

    Args:
        proc, cgroup: mounts of procfs and of the control groups.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        cores = os.cpu_count() or 1
    quota = min(_quotas(proc, cgroup), default=math.inf)
    return cores if quota >= cores else max(1, math.ceil(quota))


def _quotas(proc: Path, cgroup: Path) -> Iterator[float]:
    """CPUs that each control group around this process allows; none for a group without a quota."""
    for folder in group_folders("cpu", proc, cgroup):
        for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):  # version 2, 1
            try:
                quota, period = " ".join((folder / name).read_text() for name in names).split()
                cpus = int(quota) / int(period)  # "max" and "-1" are no quota
            except (OSError, ValueError, ZeroDivisionError):
                continue
            if cpus > 0:
                yield cpus
