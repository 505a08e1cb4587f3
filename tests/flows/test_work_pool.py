"""The `work_pool` launcher against a real server; with workers: tests/system."""

from __future__ import annotations

import threading
import time
from uuid import UUID, uuid4

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def launcher(prefect_server):
    """A launcher whose task the server has not written down, and a deployment to start."""
    from prefect import flow

    from rlhf_core.jobs import WorkPoolLauncher
    from tasks.launchers.work_pool import WorkPool

    @flow(name="a job")
    def job() -> None: ...

    made = WorkPool(WorkPoolLauncher())
    flow_id = made._client.create_flow(job)
    made.deployment = made._client.create_deployment(flow_id=flow_id, name=str(uuid4()))
    made.flow_run = made._client.create_flow_run(job).id
    return made


def write_down(client, flow_run: UUID, task: UUID, after: float) -> threading.Thread:
    from prefect import task as as_task

    @as_task(name="stage")
    def stage() -> None: ...

    def later() -> None:
        time.sleep(after)
        client.create_task_run(stage, flow_run_id=flow_run, dynamic_key=str(task), id=task)

    thread = threading.Thread(target=later)
    thread.start()
    return thread


def test_child_waits_until_the_server_knows_its_task(launcher, monkeypatch):
    from tasks.launchers import work_pool

    task = uuid4()
    monkeypatch.setattr(work_pool, "_task_run_id", lambda: task)
    thread = write_down(launcher._client, launcher.flow_run, task, after=1.0)
    child = launcher._create(launcher.deployment, name="a child")
    thread.join()
    assert child.parent_task_run_id == task


def test_child_of_a_task_that_never_comes_is_made_all_the_same(launcher, monkeypatch):
    from tasks.launchers import work_pool

    monkeypatch.setattr(work_pool, "_task_run_id", uuid4)
    monkeypatch.setattr(work_pool, "RECORDING_SECONDS", 0.5)
    assert launcher._create(launcher.deployment, name="a child").parent_task_run_id is None
