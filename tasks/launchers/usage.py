"""Memory and CPU load of a job's ranks, as `nvidia-smi` and `top` show them."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from collections.abc import Iterable

import psutil

from rlhf_core.system.host_memory import format_bytes, oom_kills, resident_peak

GIB = 2**30


class Memory:
    """Peak memory of each rank, and whether the kernel has killed a process for lack of memory."""

    def __init__(self) -> None:
        self._before = oom_kills()
        self._peaks: dict[str, int] = {}  # name of a process -> bytes
        self._names: dict[int, str] = {}  # pid -> name of the process

    def sample(self, processes: Iterable[psutil.Process]) -> None:
        """Record the peaks so far. Call often: the peak of a dead process cannot be read."""
        for process in processes:
            if process.pid not in self._names:
                rank = rank_of(process)
                if rank is None:
                    continue  # no rank, or not named yet
                self._names[process.pid] = f"rank {rank}"
            name = self._names[process.pid]
            self._peaks[name] = max(resident_peak(process.pid), self._peaks.get(name, 0))

    def oom_report(self) -> str:
        """Evidence that the kernel has killed a process; empty if there is none."""
        for path, count in oom_kills().items():
            if count > self._before.get(path, count):
                peaks = ", ".join(f"{k} {format_bytes(v)}" for k, v in sorted(self._peaks.items()))
                seen = f"\nMain memory at the peak, as last seen: {peaks}" if peaks else ""
                return f" (oom_kill in {path} rose from {self._before[path]} to {count}){seen}"
        return ""


def rank_of(process: psutil.Process) -> int | None:
    """The rank in the name that a process gave itself; None for other processes."""
    with contextlib.suppress(psutil.Error):
        if match := re.fullmatch(r"rlhf rank (\d+)", process.name()):
            return int(match[1])
    return None


def table(processes: Iterable[psutil.Process]) -> str:
    """Markdown table with one row per rank; empty without ranks.

    CPU load is measured since the last call for the same process objects, in percent of one core.
    """
    gpu = gpu_memory()
    rows = []
    for process in processes:
        if (rank := rank_of(process)) is None:
            continue
        with contextlib.suppress(psutil.Error):
            memory = process.memory_info().rss / GIB
            load = process.cpu_percent()
            used = gpu.get(process.pid)
            on_gpu = "" if used is None else f"{used / GIB:.1f} GiB"
            rows.append((rank, f"| {rank} | {memory:.2f} GiB | {load:.0f} % | {on_gpu} |"))
    if not rows:
        return ""
    head = ["| rank | memory | CPU | GPU memory |", "| ---: | ---: | ---: | ---: |"]
    return "\n".join([*head, *(text for _, text in sorted(rows))])


def gpu_memory() -> dict[int, int]:
    """Process id -> memory on its GPU in bytes; empty without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory",
               "--format=csv,noheader,nounits"]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return {}
    found = {}
    for line in done.stdout.splitlines():
        with contextlib.suppress(ValueError):
            pid, used = line.split(",")
            found[int(pid)] = int(used) * 2**20
    return found
