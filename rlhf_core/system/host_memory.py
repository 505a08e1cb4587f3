"""Memory of processes, as the kernel counts it: peaks, and what its out-of-memory killer did.

No torch in here; a rank that has torch reports the GPU's peak as well.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from rlhf_core.system.cgroups import CGROUP, PROC, group_folders


def amount(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def peak_memory() -> dict[str, int]:
    """Bytes that this process had at its peak: "in main memory", and per GPU if torch uses one."""
    peaks = {"in main memory": resident_peak(os.getpid())}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        device = torch.cuda.current_device()
        peaks[f"on GPU {device}"] = int(torch.cuda.max_memory_reserved(device))
    return peaks


def resident_peak(pid: int, proc: Path = PROC) -> int:
    """Bytes of main memory that a process had at its peak; 0 when it cannot be read."""
    try:
        status = (proc / str(pid) / "status").read_text()
    except OSError:
        return 0
    match = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def oom_kills(proc: Path = PROC, cgroup: Path = CGROUP) -> dict[str, int]:
    """Counter -> processes that the kernel has ended for lack of memory so far.

    The control group of this process, which its children share, counts its own members only, and
    all causes. Where it has no counter (a host's root group) the whole machine's is taken.
    """
    for folder in group_folders("memory", proc, cgroup):
        for name in ("memory.events", "memory.oom_control"):  # versions 2 and 1
            if (count := _count(folder / name)) is not None:
                return {str(folder / name): count}
    count = _count(proc / "vmstat")
    return {} if count is None else {str(proc / "vmstat"): count}


def _count(path: Path) -> int | None:
    try:
        match = re.search(r"^oom_kill (\d+)$", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) if match else None
