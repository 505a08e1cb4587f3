"""Runs parts one after another in this process and writes what each found."""

from __future__ import annotations

import importlib
import json
import logging
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.check import Check, NotHere, Part, describe, write_part

# Name -> module and function, and seconds after which a part is stopped on a GPU.
PARTS: dict[str, tuple[str, float]] = {
    "device": ("facts:device", 60),
    "peak": ("facts:peak", 40),
    "stages": ("stages:in_half_precision", 120),
    "numbers": ("stages:against_the_cpu", 90),
    "strategies": ("stages:strategies", 40),
    "resume": ("resuming:resume", 60),
    "syncs": ("traces:syncs", 40),
    "sft": ("speed:sft", 130),
    "profile": ("traces:profile", 40),
    "rollout": ("speed:rollout", 50),
    "ppo": ("speed:ppo", 80),
    "memory": ("speed:memory", 10),
    "out_of_memory": ("resuming:out_of_memory", 60),
    "fast_paths": ("traces:fast_paths", 30),
}


def load(part: str) -> Part:
    module, _, name = PARTS[part][0].partition(":")
    return getattr(importlib.import_module(f"benchmarks.gpu_check.{module}"), name)  # type: ignore[no-any-return]


def now_file(folder: Path) -> Path:
    """Names the running part and when it began, for the process that watches this one."""
    return folder / "now.json"


def begin(folder: Path, part: str) -> None:
    """Write `now_file`, all or nothing: another process reads it at any time."""
    partial = now_file(folder).with_suffix(".tmp")
    partial.write_text(json.dumps({"part": part, "began": time.time()}))
    partial.replace(now_file(folder))


def run_parts(check: Check, parts: list[str]) -> None:
    """Run parts; after one that leaves the device unusable, leave the rest to another process."""
    import transformers

    from rlhf_core.jobs import Resources
    from rlhf_core.runtime.distributed import Group
    from rlhf_core.runtime.rank import silence_libraries

    silence_libraries()
    Group(Resources(device=check.device))  # type: ignore[arg-type]  # before a stage on the CPU makes one
    transformers.logging.disable_progress_bar()
    log = _listen()
    for part in parts:
        begin(check.folder, part)
        log.clear()
        run_part(check, part, log)
        if not usable(check):
            return


def run_part(check: Check, part: str, log: list[str]) -> None:
    """Run one part; its warnings, those of fast paths among them, are kept with what it found."""
    found: dict[str, Any] = {}
    problems: list[str] = []
    began = time.monotonic()

    def save(status: str = "running") -> None:
        whole = found | ({"log": list(log)} if log else {})
        write_part(check.folder, part, status, time.monotonic() - began, whole, problems)

    check.saves = save
    save()
    try:
        problems = load(part)(check, found)
        status = "failed" if problems else "passed"
    except NotHere as error:
        found["reason"], status = str(error), "skipped"
    except Exception as error:
        found["traceback"], problems, status = describe(error), [_short(error)], "failed"
    save(status)
    print(f"{part}: {status} ({time.monotonic() - began:.1f} s)", flush=True)
    for problem in problems:
        print(f"  {problem}", flush=True)


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def usable(check: Check) -> bool:
    """Whether the device still computes; after an illegal access no call in this process does."""
    if not check.on_gpu:
        return True
    import torch

    try:
        return float(torch.ones(2, device="cuda").sum()) == 2
    except RuntimeError as error:
        print(f"this process has lost the device: {_short(error)}", flush=True)
        return False


def _listen() -> list[str]:
    """Warnings of this project, as they come."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger = logging.getLogger("rlhf_core")
    logger.setLevel(logging.WARNING)
    logger.addHandler(Listener())
    return lines
