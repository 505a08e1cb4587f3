"""What the machine has: GPUs, cores, memory, disk. Does not import torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from rlhf_core.system.cgroups import CGROUP, PROC, group_folders
from rlhf_core.system.cpus import cpu_cores


@dataclass(frozen=True)
class Machine:
    """The resources that this process may use.

    Attributes:
        gpus: number of GPUs.
        gpu_memory: memory of the smallest GPU in bytes; 0 without GPUs.
        cores: CPU cores.
        ram: main memory in bytes.
        gpu_name: the driver's name of the first GPU.
        gpu_free: free memory in bytes of the GPU that has least.
    """

    gpus: int = 0
    gpu_memory: int = 0
    cores: int = 1
    ram: int = 0
    gpu_name: str = ""
    gpu_free: int = 0


def this_machine() -> Machine:
    """This machine: GPUs from nvidia-smi, the rest from the kernel. Takes milliseconds."""
    import psutil

    gpus = _gpus()
    return Machine(
        gpus=len(gpus),
        gpu_memory=min((total for _, total, _ in gpus), default=0),
        cores=cpu_cores(),
        ram=min([psutil.virtual_memory().total, *memory_limits()]),
        gpu_name=gpus[0][0] if gpus else "",
        gpu_free=min((free for _, _, free in gpus), default=0),
    )


def _gpus() -> list[tuple[str, int, int]]:
    """Name, memory and free memory (bytes) of each GPU that CUDA_VISIBLE_DEVICES makes visible."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = "--query-gpu=index,uuid,name,memory.total,memory.free"
    try:
        run = subprocess.run(
            [program, query, "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return []
    if run.returncode != 0:
        return []
    return parse_gpus(run.stdout, os.environ.get("CUDA_VISIBLE_DEVICES"))


def parse_gpus(table: str, visible: str | None) -> list[tuple[str, int, int]]:
    """The visible GPUs in nvidia-smi's CSV (index, uuid, name, MiB total, MiB free).

    Args:
        visible: $CUDA_VISIBLE_DEVICES: indices or uuids; None shows all, "" none.
    """
    found: dict[str, tuple[str, int, int]] = {}
    uuids: dict[str, str] = {}
    for line in table.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 5 and fields[3].isdigit() and fields[4].isdigit():
            found[fields[0]] = (fields[2], int(fields[3]) << 20, int(fields[4]) << 20)
            uuids[fields[1]] = fields[0]
    if visible is None:
        return list(found.values())
    chosen = []
    for name in (part.strip() for part in visible.split(",")):
        index = (
            name
            if name in found
            else next((i for uuid, i in uuids.items() if name and uuid.startswith(name)), None)
        )
        if index is None:
            break  # as in CUDA: an unknown GPU hides all after it
        chosen.append(found[index])
    return chosen


def free_memory(proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """Bytes of main memory that processes here can still allocate: what the machine has available,
    or less where a control group's limit is nearer. Caches of files count as free."""
    import psutil

    free = [int(psutil.virtual_memory().available)]
    for folder in group_folders("memory", proc, cgroup):
        for limit, usage, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):  # versions 2 and 1
            try:
                left = int((folder / limit).read_text()) - int((folder / usage).read_text())
                stat = dict(
                    line.split() for line in (folder / "memory.stat").read_text().splitlines()
                )
            except (OSError, ValueError):  # "max" is no limit
                continue
            free.append(left + int(stat.get(cache, 0)))
    return max(0, min(free))


def memory_limits(proc: Path = PROC, cgroup: Path = CGROUP) -> list[int]:
    """Memory limits of the control groups around this process, in bytes."""
    limits = []
    for folder in group_folders("memory", proc, cgroup):
        for name in ("memory.max", "memory.limit_in_bytes"):  # versions 2 and 1
            try:
                text = (folder / name).read_text().strip()
            except OSError:
                continue
            if text.isdigit() and int(text) > 0:  # "max" is no limit
                limits.append(int(text))
    return limits


def free_disk(path: Path) -> int:
    """Free bytes of the disk that a path is on, or will be on."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
