"""Runs a stage from its job in this process, as a rank does, and keeps what it reports."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.gpu_check.check import Check
from benchmarks.gpu_check.facts import synchronize
from benchmarks.gpu_check.inputs import fresh
from rlhf_core.jobs import Job
from rlhf_core.runtime.context import StageContext
from rlhf_core.runtime.rank import fast_paths_as_set
from rlhf_core.runtime.work import without_measurements
from rlhf_core.store import Artifact

_numbers = itertools.count()


class Done(Exception):
    """The stage has shown what it was started for."""


@dataclass
class Ran:
    """What a stage reported.

    Attributes:
        metrics: of each step. marks: `time.perf_counter` after each.
        allocated, reserved: peak bytes of torch's allocator on the GPU; 0 on a CPU.
    """

    metrics: list[dict[str, float]] = field(default_factory=list)
    marks: list[float] = field(default_factory=list)
    artifact: Artifact | None = None
    seconds: float = 0.0
    allocated: int = 0
    reserved: int = 0

    def step_seconds(self, warm_up: int) -> list[float]:
        """Of the steps after the first `warm_up`."""
        return [b - a for a, b in itertools.pairwise(self.marks[warm_up - 1 :])]

    def numbers(self, step: int = 0) -> dict[str, float]:
        """Metrics of a step but for times; of the artifact where the stage has no steps."""
        whole: Mapping[str, Any] = {}
        if self.metrics:
            whole = self.metrics[step]
        elif self.artifact is not None:
            whole = self.artifact.metadata.get("metrics", {})
        return dict(flat(without_measurements(whole)))


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in nested mappings, by dotted name."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", float(value)


def run_stage(
    check: Check,
    job: Job,
    *,
    key: str = "",
    after_step: Callable[[int, Ran], None] = lambda step, ran: None,
) -> Ran:
    """Run a stage under a key of its own.

    Args:
        key: empty: a new one, so that nothing is resumed.
        after_step: called after each logged step, counted from 1; `Done` from it ends the stage.
    """
    ran = Ran()
    free(check)

    class Context(StageContext):
        def log_metrics(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
            synchronize(check)
            ran.marks.append(time.perf_counter())
            ran.metrics.append(dict(metrics))
            super().log_metrics(step, total, metrics)
            after_step(step, ran)

    number = next(_numbers)
    folder = fresh(check.folder / "jobs" / f"{number:03d}-{job.algorithm}")
    context = Context(store=check.store, key=key or f"{number:03d}-{time.time_ns()}", folder=folder)
    if check.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    try:
        with context.closing, fast_paths_as_set(job), contextlib.redirect_stdout(io.StringIO()):
            ran.artifact = importlib.import_module(job.module).run(job, context)
    except Done:
        pass
    finally:
        synchronize(check)
        ran.seconds = time.perf_counter() - began
        if check.on_gpu:
            ran.allocated = torch.cuda.max_memory_allocated()
            ran.reserved = torch.cuda.max_memory_reserved()
    return ran


def free(check: Check) -> None:
    """Give memory of earlier stages back to the device."""
    gc.collect()
    if check.on_gpu:
        torch.cuda.empty_cache()


def stop_after(steps: int) -> Callable[[int, Ran], None]:
    """Ends a stage after so many steps, before it evaluates and publishes."""

    def after_step(step: int, ran: Ran) -> None:
        if step == steps:
            raise Done

    return after_step


def not_finite(numbers: Mapping[str, float]) -> list[str]:
    """Names of the numbers that are NaN or infinite."""
    return [name for name, value in numbers.items() if not math.isfinite(value)]


def shown(numbers: Mapping[str, float]) -> dict[str, float]:
    """Six digits of each number."""
    return {name: float(f"{value:.6g}") for name, value in numbers.items()}
