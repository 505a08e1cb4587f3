"""What Prefect's schedules leave open: runs that were missed, and all systems beginning at once."""

from __future__ import annotations

import random
import time
from datetime import datetime
from uuid import UUID

from tasks.events import Log, log_event

SKIPPED = "Skipped"


def superseded_at(flow_run: str | None) -> datetime | None:
    """When another run of the same schedule began that does this one's work, if there is one.

    A worker that was away for three nights finds three runs waiting. The first to begin sees
    everything that is new; the others, due before it began, would repeat it. Runs that were not
    started by a schedule are always their own.
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
    """Sleep for a time within `jitter` seconds that is this run's own, also when it is retried."""
    if not jitter:
        return
    seconds = random.Random(flow_run).uniform(0, jitter)
    log_event(log, "note", "retrain", f"begins in {seconds:.0f} s, of at most {jitter} s")
    time.sleep(seconds)
