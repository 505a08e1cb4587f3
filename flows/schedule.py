"""Additions to Prefect's schedules: missed runs are skipped, and starts are spread (jitter)."""

from __future__ import annotations

import random
import time
from datetime import datetime
from uuid import UUID

from rlhf_core.jobs import PipelineConfig
from rlhf_core.pipeline.recipe import data_sources
from tasks.events import Log, log_event

SKIPPED = "Skipped"


def trains(config: PipelineConfig) -> str:
    """What a retraining with these settings trains, and publishes, in one sentence."""
    base = "a new model" if config.new_model else config.model.source
    sources = [data.source for _, _, data in data_sources(config)]
    read = ", ".join(dict.fromkeys(sources))
    stages = ", ".join(config.stages)
    return f"trains {base} ({stages}) on {read}, for the name {config.publish.name}"


def superseded_at(flow_run: str | None) -> datetime | None:
    """Start of another run of the same schedule that covers this one; None without such a run.

    After three nights without a worker, three runs are waiting. The first to start processes all
    new data; the others, which were due before it started, would repeat its work. A run that no
    schedule has started is never superseded.
    """
    if not flow_run:
        return None
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.client.schemas.sorting import FlowRunSort

    client = get_client(sync_client=True)
    own = client.read_flow_run(UUID(str(flow_run)))
    due = own.next_scheduled_start_time or own.expected_start_time
    if not own.auto_scheduled or own.deployment_id is None or not due or not own.start_time:
        return None
    others = client.read_flow_runs(
        flow_run_filter=FlowRunFilter.model_validate(
            {
                "deployment_id": {"any_": [own.deployment_id]},
                "start_time": {"after_": due, "before_": own.start_time},
                "state": {"type": {"any_": ["RUNNING", "COMPLETED"]}},
            }
        ),
        sort=FlowRunSort.START_TIME_DESC,
        limit=50,
    )
    for run in others:
        if run.id == own.id or not run.auto_scheduled or run.start_time is None:
            continue
        if run.state_name != SKIPPED and due < run.start_time < own.start_time:
            return run.start_time
    return None


def wait(jitter: int, flow_run: str | None, log: Log) -> None:
    """Sleep for up to `jitter` seconds. A retry of the run sleeps equally long."""
    if not jitter:
        return
    seconds = random.Random(flow_run).uniform(0, jitter)
    log_event(log, "note", "retrain", f"starts in {seconds:.0f} s (jitter of up to {jitter} s)")
    time.sleep(seconds)
