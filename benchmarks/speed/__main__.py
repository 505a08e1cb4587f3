"""How fast training is, beside TRL on the same work: `make bench`.

Each measurement is a fresh process; sides take turns, after one run of each that does not count.
Both sides must reach the same loss on the same batches, else the row says so. Results go to a
folder as results.json, table.md and picture.png.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.speed import report, workload
from benchmarks.speed.flops import share
from rlhf_core.system.cpus import cpu_cores
from tasks.launchers.command import OPENMP_WAIT

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STAGES = ("sft", "reward", "grpo", *workload.PPO)
ROWS = (*STAGES, "rollout", "scoring")
ONLY = {"smollm2-256": ("sft",), "smollm2-256-bf16": ("sft",)}  # else all rows
MODELS = ("tiny", "smollm2", *ONLY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated")
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=cpu_cores())
    parser.add_argument("--out", type=Path, default=ROOT / ".rlhf" / "bench")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    print(f"load before: {os.getloadavg()[0]:.1f} on {cpu_cores()} cores", flush=True)
    path = arguments.out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for model in arguments.models.split(","):
        if workload.SIZES[model].precision == "bf16" and not computes_in_bf16():
            print(f"{model}: left out, this processor has no bf16 arithmetic", flush=True)
            continue
        folder = arguments.out / model
        make(model, folder, arguments.out)
        rows = [r for r in arguments.rows.split(",") if r in ONLY.get(model, ROWS)]
        for row in rows:
            found = compare(row, model, folder, arguments)
            results[f"{row} {model}"] = found
            path.write_text(json.dumps(results, indent=1) + "\n")
            print(report.line(f"{row} {model}", found), flush=True)
    report.write(results, arguments.out)
    print((arguments.out / "table.md").read_text())


def computes_in_bf16() -> bool:
    """In a process of its own: torch's memory is not to count in what this one starts."""
    code = (
        "import torch; from rlhf_core.runtime.distributed import computes_in_bf16 as c; "
        "raise SystemExit(not c(torch.device('cpu')))"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def make(model: str, folder: Path, out: Path) -> None:
    """The workload, in a process of its own: its memory is not to count in any measurement."""
    code = (
        "import sys; from pathlib import Path; from benchmarks.speed import workload as w; "
        "w.make(sys.argv[1], Path(sys.argv[2]), w.smollm2(Path(sys.argv[3])))"
    )
    subprocess.run(
        [sys.executable, "-c", code, model, str(folder), str(out / "import")],
        check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def compare(row: str, model: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both sides in turn."""
    sides: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
    peaks = [run("peak", "ours", folder, arguments.threads)]
    for number in range(arguments.repeats + 1):
        for side, found in sides.items():
            result = run(row, side, folder, arguments.threads)
            if number:
                found.append(result)
    peaks.append(run("peak", "ours", folder, arguments.threads))
    precision = workload.SIZES[model].precision
    peak = max(p[precision] for p in peaks)
    checked = check(row, folder, arguments.threads, sides)
    ratios = neighbours(*([r["rate"] for r in sides[s]] for s in ("ours", "theirs")))
    ours, theirs = (summary(found) for found in sides.values())
    low, _, high = statistics.quantiles(ratios) if len(ratios) > 1 else ratios * 3
    return {
        "precision": precision,
        "ours": ours,
        "theirs": theirs,
        "ratio": statistics.median(ratios),
        "quartiles": [low, high],
        "memory_ratio": ours["rss"] / theirs["rss"],
        "peak": peak,
        "share": {s: share(row, workload.load(folder), sides[s], peak) for s in sides},
        "losses": checked,
        "load": os.getloadavg()[0],
        "time": time.strftime("%Y-%m-%d %H:%M"),
    }


def neighbours(ours: list[float], theirs: list[float]) -> list[float]:
    """Ratios of the runs that stood beside each other, as sides take turns and ours begins: what
    the machine does in some minutes meets both."""
    return [a / b for some in (ours, ours[1:]) for a, b in zip(some, theirs, strict=False)]


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and spread of the rate, median of the peaks of memory."""
    rates = [r["rate"] for r in runs]
    extra = {k: runs[-1][k] for k in ("mean_length",) if k in runs[-1]}
    return {"rate": statistics.median(rates), "low": min(rates), "high": max(rates),
            "rates": rates, "rss": statistics.median(r["rss"] for r in runs), **extra}  # fmt: skip


def check(
    row: str, folder: Path, threads: int, sides: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """The largest difference between the sides' losses, on the same batches."""
    if row == "rollout":  # replies are sampled: only their lengths can be compared
        return {}
    pair = [sides[s][-1]["losses"] for s in ("ours", "theirs")]
    if row in ("grpo", *workload.PPO):
        pair = [run(row, s, folder, threads, "--given")["losses"] for s in ("ours", "theirs")]
    if len(pair[0]) != len(pair[1]):
        raise SystemExit(f"{row}: {len(pair[0])} losses and {len(pair[1])}; the sides do not match")
    scale = max(abs(x) for x in pair[1])
    gap = max(abs(a - b) for a, b in zip(*pair, strict=True))
    return {"ours": pair[0], "theirs": pair[1], "gap": gap, "relative": gap / scale}


def run(row: str, side: str, folder: Path, threads: int, *more: str) -> dict[str, Any]:
    """One measurement: its line of JSON."""
    other = {"rollout": "generate", "scoring": "whole-logits"}
    # Threads wait as our launcher lets them wait, and the peer's as they do by default.
    environment = {k: v for k, v in os.environ.items() if k not in OPENMP_WAIT}
    environment |= {"OMP_NUM_THREADS": str(threads)} | (OPENMP_WAIT if side == "ours" else {})
    peers = ROOT / ".venv-bench" / "bin" / "python"
    if row not in STAGES:
        part = row if side == "ours" else other[row]
        command = [sys.executable, "-m", "benchmarks.speed.parts", part]
    elif side == "ours":
        command = [sys.executable, "-m", "benchmarks.speed.ours", row]
    else:
        command = [str(peers), str(HERE / "peer.py"), row]
        if row in workload.PPO:
            environment["PYTHONPATH"] = str(ROOT / ".venv-bench" / "ppo")
    done = subprocess.run(
        [*command, str(folder), "--threads", str(threads), *more],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    if done.returncode or not done.stdout.strip():
        raise SystemExit(f"{row}, {side}, ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
