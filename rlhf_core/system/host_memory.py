"""Memory of processes, as the kernel counts it: peaks, and kills by its out-of-memory killer.

Does not import torch. In a rank that has imported it, the GPU's peak is reported as well.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from pathlib import Path

from rlhf_core.system.cgroups import CGROUP, PROC, group_folders

# In messages of CUDA, NCCL, torch's host allocator, the C library, C++ and cuBLAS.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can.?t allocate memory|cannot allocate memory|bad_alloc|ALLOC_FAILED",
    re.I,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator, of the host or of a GPU, had no memory left."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return _OUT_OF_MEMORY.search(str(error)) is not None


def format_bytes(size: int) -> str:
    """A number of bytes as text."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def peak_memory() -> dict[str, int]:
    """Peak memory of this process in bytes: "in main memory", and on its GPU if torch uses one."""
    peaks = {"in main memory": resident_peak(os.getpid())}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        device = torch.cuda.current_device()
        peaks[f"on GPU {device}"] = int(torch.cuda.max_memory_reserved(device))
    return peaks


def resident_peak(pid: int, proc: Path = PROC) -> int:
    """Peak resident memory of a process in bytes; 0 when it cannot be read."""
    try:
        status = (proc / str(pid) / "status").read_text()
    except OSError:
        return 0
    match = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def oom_kills(proc: Path = PROC, cgroup: Path = CGROUP) -> dict[str, int]:
    """File of a counter -> processes that the kernel has killed for lack of memory so far.

    The counter of this process's control group covers its members only, its children included.
    Where there is none (a host's root group), the counter of the whole machine is read.
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
