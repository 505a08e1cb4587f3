"""What making a stage's result took. It is kept in the stage's record, not in the artifact.

Runs of equal settings and inputs have artifacts of equal digests: nothing in an artifact depends on
the clock or the machine. `Store.stage_work` returns what is kept of a stage:

    started, ended   ISO 8601, UTC, of the attempt that made the result; `ended` once it is stored
    seconds          of work, without waiting for a place to run: from the start of the job on rank
                     0 until its result is stored. Earlier attempts count up to the checkpoint that
                     the result goes on from.
    ranks            processes
    gpus             of them on a GPU: all, or 0
    device           name of rank 0's GPU, or "cpu"
    throughput       metric, such as "tokens_per_second" -> median over the steps
    steps            {"step": [...], "time": [...], metric: [...]}: end of each step in seconds
                     since 1970, and its measurements; of more than STEPS, every nth

Results of older versions have none of this: then `Store.stage_work` is empty.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

STEPS = 500  # that a record keeps: it is read and written again whenever the result is reused


def is_measurement(metric: str) -> bool:
    """Whether a metric of a step tells the machine's speed: `time`, `…_seconds`, `…_per_second`."""
    return metric == "time" or metric.endswith(("_seconds", "_per_second"))


def without_measurements(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics that are a function of settings and inputs."""
    return {name: value for name, value in metrics.items() if not is_measurement(name)}


def work(
    started: float, ended: float, seconds: float, ranks: int, lines: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What the record keeps.

    Args:
        started, ended: seconds since 1970. seconds: of work.
        lines: of metrics.jsonl, oldest first.
    """
    device = gpu_name()
    names = dict.fromkeys(name for line in lines for name in line if is_measurement(name))
    shown = lines[-1 :: -max(1, -(-len(lines) // STEPS))][::-1]
    steps = {name: [line.get(name) for line in shown] for name in ("step", *names)}
    measured = {n: [line[n] for line in lines if n in line] for n in names if n != "time"}
    return {
        "started": _iso(started),
        "ended": _iso(ended),
        "seconds": round(seconds, 2),
        "ranks": ranks,
        "gpus": ranks if device else 0,
        "device": device or "cpu",
        "throughput": {name: statistics.median(values) for name, values in measured.items()},
        **({"steps": steps} if lines else {}),
    }


def gpu_name() -> str:
    """The GPU that this process computes on; "" if it computes on the CPU."""
    torch = sys.modules.get("torch")  # some stages do not need it
    if torch is None or not torch.cuda.is_initialized():
        return ""
    return str(torch.cuda.get_device_name())


def _iso(when: float) -> str:
    return datetime.fromtimestamp(when, UTC).isoformat(timespec="milliseconds")
