"""Runs jobs: reuses what the store has under their stage keys, and launches the rest."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_core.errors import RETRYABLE, JobFailed
from rlhf_core.jobs import Job
from rlhf_core.store import Artifact
from tasks import assets
from tasks.events import Log, headline, say, seconds
from tasks.launchers import Launch, launcher_for
from tasks.progress import Lines, Progress
from tasks.run import Run, StageResult, elapsed

_micro_batch_sizes: dict[str, int] = {}  # stage key -> size to try after running out of memory


def run_jobs(run: Run, stage: str, jobs: Mapping[str, Job], log: Log) -> list[StageResult]:
    """The results of jobs that may share one process group, in order.

    Args:
        stage: name of the group, for people.
        jobs: name of each result in the run's record -> job.

    Raises:
        JobFailed: see `Launcher.run`.
    """
    results: dict[str, StageResult] = {}
    for name, job in jobs.items():
        began = time.monotonic()
        artifact = run.store.stage_result(job.key())
        if artifact is not None:
            results[name] = _note(run, name, job, artifact, True, elapsed(began), log)
    missing = {name: _fit(job) for name, job in jobs.items() if name not in results}
    if missing:
        began = time.monotonic()
        for name, artifact in _launch(run, stage, missing, log).items():
            results[name] = _note(run, name, jobs[name], artifact, False, elapsed(began), log)
    return [results[name] for name in jobs]


def _launch(run: Run, stage: str, jobs: Mapping[str, Job], log: Log) -> dict[str, Artifact]:
    top = _attempt_folder(run.folder / stage)
    single = len(jobs) == 1
    folders = {name: top if single else top / name for name in jobs}
    launch = Launch(
        name=stage,
        jobs={folders[name]: job for name, job in jobs.items()},
        store=run.store.url,
        log=top / "log.txt",
    )
    ranks = next(iter(jobs.values())).placement().ranks
    torchrun = next(iter(jobs.values())).torchrun
    say(log, "start", stage, f"starting ({ranks} ranks)" if torchrun else "starting")
    progress = Progress(stage, log)
    try:
        outcomes = launcher_for(run.config.launcher).run(launch, Lines(stage, log), progress)
    except JobFailed as error:
        if error.category == "oom":
            for job in jobs.values():
                _shrink(job, error)
        raise
    return {name: run.store.get(o.artifact) for name, o in zip(jobs, outcomes, strict=True)}


def _note(
    run: Run, name: str, job: Job, artifact: Artifact, reused: bool, took: float, log: Log
) -> StageResult:
    metrics = artifact.metadata.get("metrics") or {}
    result = StageResult(
        stage=name, digest=artifact.digest, kind=artifact.kind, key=job.key(),
        reused=reused, seconds=took, metrics=metrics,
    )  # fmt: skip
    how = "reused" if reused else f"done in {seconds(took)}"
    say(
        log, "done", name, f"{how}, {artifact.ref}  {headline(metrics)}".rstrip(),
        reused=reused, seconds=took, ref=artifact.ref, metrics=metrics,
    )  # fmt: skip
    if reused:
        assets.reused(run.store, name, artifact)
    else:
        assets.made(run.store, name, artifact, metrics)
    return run.add(result)


def _attempt_folder(base: Path) -> Path:
    """A new folder for every attempt: a job folder holds one attempt's files."""
    folder, number = base, 1
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder


# --------------------------------------------------------------------------- out of memory


def _fit(job: Job) -> Job:
    """The job with the micro-batch that is left after it ran out of memory.

    The accumulation follows from the batch size, so the stage computes the same, under its key.
    """
    size = _micro_batch_sizes.get(job.key())
    return job if size is None else _with_micro_batch(job, size)


def _shrink(job: Job, error: JobFailed) -> None:
    """Remember half the micro-batch for the next attempt.

    Raises:
        JobFailed: it cannot be made smaller; not worth a retry.
    """
    placement = job.placement()
    size = placement.micro_batch_size // 2
    per_rank = getattr(job, "batch_size", 0) // placement.ranks
    while size > 1 and per_rank % size:
        size -= 1
    if size < 1 or not hasattr(job, "resources"):
        raise JobFailed(
            f"{error}\nThe micro-batch cannot be made smaller: use more ranks, another strategy, "
            "gradient_checkpointing or shorter sequences.",
            category="memory",
        ) from error
    _micro_batch_sizes[job.key()] = size


def _with_micro_batch(job: Job, size: int) -> Job:
    placement = job.placement().model_copy(update={"micro_batch_size": size})
    return job.model_copy(update={"resources": placement})


# --------------------------------------------------------------------------- retries


def worth_a_retry(task: Any, task_run: Any, state: Any) -> bool:
    """Prefect's retry_condition_fn: True for failures that another attempt can mend."""
    error = state.data
    category = getattr(error, "category", None)
    if category not in RETRYABLE:
        return False
    from prefect.logging.loggers import task_run_logger

    reason = str(error).splitlines()[0].removeprefix(f"{task.name} failed: ")
    delays = task.retry_delay_seconds or [0]
    delay = delays[min(task_run.run_count - 1, len(delays) - 1)]
    text = f"{reason}; attempt {task_run.run_count + 1} of {task.retries + 1} in {delay:.0f} s"
    if category == "oom":
        text += ", with half the micro-batch"
    say(task_run_logger(task_run, task), "retry", task.name, text)
    return True
