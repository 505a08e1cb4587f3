"""Checks and measures this project on a machine with one GPU; `make gpu-check`.

    python -m benchmarks.gpu_check --device auto --out FILE [--limit 470] [--parts sft,profile]

Parts run in a process of their own. A part that fails, dies or takes too long is recorded, and the
parts behind it run in another process. FILE is written anew after each part. The exit code is 0 if
no part failed and all ran.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.check import Check, part_file, write_part
from benchmarks.gpu_check.worker import PARTS, now_file, run_parts

STARTING = 90.0  # seconds that a process may take before its first part begins
# cuBLAS adds up in a fixed order only with this; it is read when a process first uses the GPU.
ENVIRONMENT = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
PATIENCE = {"cuda": 1.0, "cpu": 4.0}  # factor on the seconds that a part may take


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.worker:
        run_parts(Check(options.device, options.work, stages=options.stages), options.parts)
        return 0
    if options.device == "auto":
        options.device = "cuda" if has_gpu() else "cpu"
    began = time.monotonic()
    work = options.work or Path(tempfile.mkdtemp(prefix="gpu-check-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        supervise(options, work, began)
    finally:
        report = write_report(options, work, began)
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)
    bad = [name for name, part in report["parts"].items() if part["status"] == "failed"]
    print(f"{options.out}: " + (f"failed: {', '.join(bad)}" if bad else "all parts passed"))
    return 1 if bad else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    names = lambda text: tuple(text.split(","))  # noqa: E731
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--out", type=Path, default=Path(".rlhf/gpu-check.json"))
    parser.add_argument("--limit", type=float, default=470.0, help="seconds in all")
    parser.add_argument("--parts", type=names, default=tuple(PARTS))
    parser.add_argument("--stages", type=names, default=(), help="of the parts stages and numbers")
    parser.add_argument("--work", type=Path, help="folder for store and jobs; kept")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown:
        parser.error(f"there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return options


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def supervise(options: argparse.Namespace, work: Path, began: float) -> None:
    """Run all parts, in as many processes as it takes."""
    left = list(options.parts)
    while left:
        rest = options.limit - (time.monotonic() - began)
        if rest <= 0:
            break
        now_file(work).unlink(missing_ok=True)
        command = [
            sys.executable, "-m", "benchmarks.gpu_check", "--worker", "--device", options.device,
            "--work", str(work), "--parts", ",".join(left),
            *(("--stages", ",".join(options.stages)) if options.stages else ()),
        ]  # fmt: skip
        worker = subprocess.Popen(command, start_new_session=True, env=ENVIRONMENT)
        try:
            tell = functools.partial(write_report, options, work, began)
            why = watch(worker, work, rest, PATIENCE[options.device], tell)
        finally:
            stop(worker)
        finish_part(work, left, why)
        left = [part for part in left if not part_file(work, part).exists()]
    for part in left:
        write_part(work, part, "failed", 0.0, {}, [f"not run: the {options.limit:g} s were over"])


def watch(worker: Any, work: Path, seconds: float, patience: float, tell: Any) -> str:
    """Wait until the process ends, or the time of its part or of all; why it ended.

    Args:
        tell: called when a part has begun.
    """
    end, started, seen = time.monotonic() + seconds, time.time(), ""
    while worker.poll() is None:
        time.sleep(0.2)
        now = read_json(now_file(work))
        if now and now["part"] != seen:
            seen = now["part"]
            tell()
        if time.monotonic() > end:
            return "the time for all parts was over"
        limit = patience * (PARTS[now["part"]][1] if now else STARTING)
        if time.time() - now.get("began", started) > limit:
            return f"took longer than {limit:g} s"
    return f"the process ended with exit code {worker.returncode}"


def stop(worker: Any) -> None:
    """End a process with its children."""
    if worker.poll() is None:
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def finish_part(work: Path, left: list[str], why: str) -> None:
    """Mark the part in which a process ended; where it had begun none, the first one."""
    part = read_json(now_file(work)).get("part", left[0])
    known = read_json(part_file(work, part)) or {"status": "running", "seconds": 0.0, "found": {}}
    if known["status"] == "running":
        write_part(work, part, "failed", known["seconds"], known["found"], [why])


def read_json(path: Path) -> dict[str, Any]:
    """A file's value; empty where there is none, or half of one."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def write_report(options: argparse.Namespace, work: Path, began: float) -> dict[str, Any]:
    """Put the parts together into the result file."""
    parts = {p: read_json(part_file(work, p)) for p in options.parts if part_file(work, p).exists()}
    report = {
        "made_by": "python -m benchmarks.gpu_check",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": options.device,
        "seconds": round(time.monotonic() - began, 1),
        "parts": parts,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    partial = options.out.with_suffix(".part")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(options.out)
    return report


if __name__ == "__main__":
    sys.exit(main())
