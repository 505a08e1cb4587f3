"""Runs jobs: results that the store has under the jobs' stage keys are reused, others are made."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_core.errors import RETRYABLE, JobFailed, StoreError
from rlhf_core.jobs import Job, Resources
from rlhf_core.runtime import candidates
from rlhf_core.store import Artifact
from tasks import assets, out_of_memory
from tasks.events import Log, headline, log_event, seconds
from tasks.launchers import Launch, launcher_for
from tasks.progress import Lines, Progress
from tasks.run import Run, StageResult, elapsed

LONG_WAIT = 10.0
"""Seconds of waiting, the start of the processes included, that the log mentions."""


def run_jobs(run: Run, stage: str, jobs: Mapping[str, Job], log: Log) -> list[StageResult]:
    """The results of jobs, in order. Jobs without a result are launched in one process group.

    Args:
        stage: name of the group, for messages.
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
    missing = {name: job for name, job in jobs.items() if name not in results}
    if missing:
        began = run.began.setdefault(stage, time.monotonic())
        with _observed(run, missing):
            made = _launch(run, stage, missing, log)
        work = {n: run.store.stage_work(jobs[n].key()).get("seconds", 0.0) for n in made}
        waited = max(0.0, elapsed(began) - sum(work.values()))
        for name, artifact in made.items():
            took = round(waited + work[name], 2)
            results[name] = _note(run, name, jobs[name], artifact, False, took, log)
            waited = 0.0  # jobs of one launch have waited together
        del run.began[stage]
    for name in jobs:  # in their order, whichever were reused: the model card lists them
        run.stages[name] = run.stages.pop(name)
    return [results[name] for name in jobs]


@contextlib.contextmanager
def _observed(run: Run, jobs: Mapping[str, Job]) -> Iterator[None]:
    """Tell the run's observers that attempts begin inside the block, and of those that fail."""
    for observer in run.observers:
        for name, job in jobs.items():
            observer.started(name, job)
    try:
        yield
    except BaseException as error:
        for observer in run.observers:
            for name in jobs:
                observer.stopped(name, error)
        raise


def _launch(run: Run, stage: str, jobs: Mapping[str, Job], log: Log) -> dict[str, Artifact]:
    top = _attempt_folder(run.folder / stage)
    single = len(jobs) == 1
    folders = {name: top if single else top / name for name in jobs}
    launch = Launch(
        name=stage,
        jobs={folders[name]: out_of_memory.fit(run.store, job) for name, job in jobs.items()},
        store=run.store.url,
        log=top / "log.txt",
        priority=run.config.priority,
        author=run.config.author or run.config.name,
    )
    first = next(iter(jobs.values()))
    size = f" ({_size(first.placement())})" if first.torchrun else ""
    log_event(log, "start", stage, f"starting{size}")
    shown = Progress(stage, log)

    def progress(line: dict[str, Any]) -> None:
        if "waiting" not in line:
            shown(line)
            return
        with contextlib.suppress(StoreError):  # it is only for `rlhf runs`
            run.save(waiting=line["waiting"])

    try:
        outcomes = launcher_for(run.config.launcher).run(launch, Lines(stage, log), progress)
    except JobFailed as error:
        if error.category == "collapse":
            raise _with_candidate(run, jobs, error) from None
        if error.category != "oom":
            raise
        for job in jobs.values():
            error = out_of_memory.shrink(run.store, job, error)
        raise error from None
    for job in jobs.values():
        out_of_memory.forget(run.store, job)
    return {name: run.store.get(o.artifact) for name, o in zip(jobs, outcomes, strict=True)}


def _size(resources: Resources) -> str:
    ranks = f"{resources.ranks} {'rank' if resources.ranks == 1 else 'ranks'}"
    return ranks if resources.nodes == 1 else f"{resources.nodes} nodes, {ranks} each"


def _with_candidate(run: Run, jobs: Mapping[str, Job], error: JobFailed) -> JobFailed:
    """The failure with the last good policy that the job left in the store."""
    [job] = jobs.values()  # a training stage
    try:
        left = candidates.read(run.store, job.key())
    except StoreError:  # must not replace the reason of the failure
        left = None
    return JobFailed(str(error), error.category, left.digest if left else "")


def _note(
    run: Run, name: str, job: Job, artifact: Artifact, reused: bool, took: float, log: Log
) -> StageResult:
    work = run.store.stage_work(job.key())
    work.pop("steps", None)
    metrics = artifact.metadata.get("metrics") or {}
    result = StageResult(
        stage=name, digest=artifact.digest, kind=artifact.kind, key=job.key(),
        reused=reused, seconds=took, work=work, metrics=metrics,
    )  # fmt: skip
    waited = result.seconds - result.worked
    after = f" after {seconds(waited)} of waiting" if waited >= LONG_WAIT and not reused else ""
    how = "reused" if reused else f"done in {seconds(result.worked)}{after}"
    log_event(
        log, "done", name, f"{how}, {artifact.ref}  {headline(result.shown)}".rstrip(),
        reused=reused, seconds=result.worked, ref=artifact.ref, metrics=result.shown,
    )  # fmt: skip
    if reused:
        assets.reused(run.store, name, artifact)
    else:
        assets.made(run.store, name, artifact, metrics)
    return run.add(result)


def _attempt_folder(base: Path) -> Path:
    """A new folder for each attempt, since a job folder has the files of one attempt."""
    folder, number = base, 1
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder


# --------------------------------------------------------------------------- retries


def should_retry(task: Any, task_run: Any, state: Any) -> bool:
    """Prefect's retry_condition_fn: True for failures for which another attempt can help."""
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
    if category == "rate_lowered":
        text += ", with a lower learning rate"
    log_event(task_run_logger(task_run, task), "retry", task.name, text)
    return True
