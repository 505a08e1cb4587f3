"""What the ranks of a job use: memory and load, as `nvidia-smi` and `top` would show them."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterable

import psutil

GIB = 2**30


def table(processes: Iterable[psutil.Process]) -> str:
    """Markdown table with one line per rank; empty when none is found.

    CPU load is that since the last call for the same process objects, in percent of one core.
    """
    gpu = gpu_memory()
    rows = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            rank = process.environ().get("RANK")
            if rank is None or not process.environ().get("LOCAL_RANK"):
                continue
            memory = process.memory_info().rss / GIB
            load = process.cpu_percent()
            used = gpu.get(process.pid)
            on_gpu = "" if used is None else f"{used / GIB:.1f} GiB"
            rows.append((int(rank), f"| {rank} | {memory:.2f} GiB | {load:.0f} % | {on_gpu} |"))
    if not rows:
        return ""
    head = ["| rank | memory | CPU | GPU memory |", "| ---: | ---: | ---: | ---: |"]
    return "\n".join([*head, *(text for _, text in sorted(rows))])


def gpu_memory() -> dict[int, int]:
    """Process -> bytes on its GPU; empty without nvidia-smi."""
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
