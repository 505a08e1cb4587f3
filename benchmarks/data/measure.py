"""Time, processor time and memory of a command with all the processes that it starts."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

EVERY = 0.5  # seconds between two looks at the memory
PR_SET_CHILD_SUBREAPER = 36


def measured(command: list[str], cores: int, environment: dict[str, str]) -> dict[str, Any]:
    """Run a command on the first ``cores`` cores.

    Returns:
        seconds, cpu (processor seconds of all its processes), first_cpu (of the first one, at the
        last look), peak (bytes, PSS of all of them together), and what a last line of JSON says.
    """
    # Orphans are adopted by this process, so that their processor time is counted too.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    chosen = sorted(os.sched_getaffinity(0))[:cores]
    before = cpu_of_children()
    began = time.perf_counter()
    process = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": str(cores)} | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE if "-m" in command else None,
        preexec_fn=lambda: os.sched_setaffinity(0, chosen),
    )  # fmt: skip
    looked = {"peak": 0.0, "first_cpu": 0.0}
    thread = threading.Thread(target=look, args=(process, looked), daemon=True)
    thread.start()
    output, errors = process.communicate()
    seconds = time.perf_counter() - began
    thread.join()
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, 0):
            pass
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{output[-2000:]}{(errors or '')[-2000:]}")
    last = output.splitlines()[-1] if output.strip() else ""
    said = json.loads(last) if last.startswith("{") else {}
    return {"seconds": seconds, "cpu": cpu_of_children() - before, **looked, **said}


def cpu_of_children() -> float:
    """Processor seconds of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def look(process: subprocess.Popen[str], looked: dict[str, float]) -> None:
    """Keep the peak of memory and the first process's time while it runs."""
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            first = psutil.Process(process.pid)
            times = first.cpu_times()
            looked["first_cpu"] = times.user + times.system
            tree = [first, *first.children(recursive=True)]
            looked["peak"] = max(looked["peak"], sum(pss(one.pid) for one in tree))
        time.sleep(EVERY)


def pss(pid: int) -> int:
    """Bytes of a process's memory; what processes share is divided among them."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0
