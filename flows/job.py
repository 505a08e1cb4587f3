"""The flow that runs one stage on a GPU worker; the `work_pool` launcher submits it."""

from __future__ import annotations

from typing import Any

from prefect import flow, runtime
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.logging.handlers import APILogHandler
from prefect.states import Completed
from prefect.utilities.urls import url_for

from rlhf_core.errors import JobFailed, RLHFError
from rlhf_core.jobs import Job
from rlhf_core.preflight.settings import check_placement
from rlhf_core.store import open_store
from rlhf_core.system.machine import this_machine
from rlhf_core.system.private import private_folder
from tasks.events import log_event, tidy_logs
from tasks.flow_runs import failed
from tasks.launchers import Launch, LocalTorchrun
from tasks.progress import Lines, Progress
from tasks.watch import stop_when_cancelled

tidy_logs()


@flow(name="rlhf-job", persist_result=False)
def rlhf_job(
    stage: str, jobs: list[Job], store: str | None = None, pipeline: str | None = None
) -> State[Any]:
    """Runs jobs with torchrun on this machine, and publishes their results to the store.

    Args:
        stage: name of the stage, such as sft.
        jobs: they run one after another in the same processes.
        store: URL of the artifact store; empty: this worker's RLHF_STORE.
        pipeline: id of the flow run that waits for the results; this run is cancelled with it.
    """
    log = get_run_logger()
    if pipeline:
        log_event(log, "note", "", f"{stage} of the pipeline {url_for('flow-run', pipeline)}")
    run_id = str(runtime.flow_run.id)[:8]
    folder = private_folder("jobs") / f"{run_id}-{runtime.flow_run.run_count or 1}-{stage}"
    with stop_when_cancelled(pipeline):
        try:
            opened = open_store(store)
            problems = [p for job in jobs for p in check_placement(job, this_machine())]
            if problems:
                raise JobFailed("; ".join(dict.fromkeys(problems)), category="config")
            names = [folder] if len(jobs) == 1 else [folder / job.algorithm for job in jobs]
            if len(set(names)) < len(names):
                names = [folder / str(i) for i in range(len(jobs))]
            launch = Launch(
                stage, dict(zip(names, jobs, strict=True)), opened.url, folder / "log.txt"
            )
            outcomes = LocalTorchrun().run(launch, Lines(stage, log), Progress(stage, log))
        except RLHFError as error:
            state = failed(error)
            log.error("%s", state.message)
            APILogHandler().flush()
            return state
    # The server has all log records before the state at which the parent stops reading them.
    APILogHandler().flush()
    return Completed(message=", ".join(f"{o.kind}/{o.artifact[:12]}" for o in outcomes))
