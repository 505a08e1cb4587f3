"""The `work_pool` launcher against a real server; with workers: tests/system."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from datetime import UTC, datetime, timedelta
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


# --------------------------------------------------------------------------- shared children


@pytest.fixture
def shared(launcher, monkeypatch):
    """A job's child that runs, two pipelines, and a launcher that is one of them at a time."""
    from prefect.states import Running

    from tasks.launchers import work_pool
    from tasks.waiters import mark_waiting

    client = launcher._client
    launcher.key = uuid4().hex
    launcher.child = client.create_flow_run_from_deployment(
        launcher.deployment, tags=[f"job:{launcher.key}"]
    )
    client.set_flow_run_state(launcher.child.id, Running(), force=True)
    launcher.pipelines = []
    for _ in range(2):
        pipeline = client.create_flow_run_from_deployment(launcher.deployment, state=Running()).id
        mark_waiting(client, pipeline, launcher.key)
        launcher.pipelines.append(pipeline)
    launcher.said = []

    def leave(number: int) -> None:
        monkeypatch.setattr(work_pool, "_own_id", lambda: launcher.pipelines[number])
        stop = KeyboardInterrupt()
        launcher._leave(launcher.child, launcher.key, stop, launcher.said.append)

    launcher.leave = leave
    return launcher


def test_cancelled_twin_leaves_the_child_to_the_other_one(shared):
    from prefect.states import Cancelled

    from tasks.watch import _Watch

    client, owner = shared._client, shared.pipelines[0]
    watch = _Watch(shared.child.id, owner, shared.key)
    client.set_flow_run_state(owner, Cancelled(), force=True)
    shared.leave(0)
    assert client.read_flow_run(shared.child.id).state.is_running()
    assert "leaving the flow run" in shared.said[-1]
    assert not watch._abandoned(client)
    shared.leave(1)
    assert client.read_flow_run(shared.child.id).state.is_cancelling()
    client.set_flow_run_state(shared.pipelines[1], Cancelled(), force=True)
    assert watch._abandoned(client)


def heartbeat(client, run: UUID, ago: float) -> None:
    when = datetime.now(UTC) - timedelta(seconds=ago)
    event = {
        "occurred": when.isoformat(), "event": "prefect.flow-run.heartbeat", "id": str(uuid4()),
        "resource": {"prefect.resource.id": f"prefect.flow-run.{run}"},
    }  # fmt: skip
    assert client.request("POST", "/events", json=[event]).status_code == 204


def test_child_that_sends_no_heartbeats_is_not_joined(shared, monkeypatch):
    """Its state is set now, so that a second of silence is long."""
    from tasks import waiters

    client = shared._client
    assert waiters.silence(client, shared.child) == 0.0, "heartbeats may be off"
    heartbeat(client, shared.child.id, ago=30)
    child = client.read_flow_run(shared.child.id)
    deadline = time.monotonic() + 20
    while not waiters.silence(client, child):  # the server writes events in batches
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert waiters.silence(client, child) < 25, "the state is newer"
    assert waiters.lives(client, child)
    monkeypatch.setattr(waiters, "SILENCE_SECONDS", 0.01)
    monkeypatch.setattr(waiters, "SIGN_SECONDS", 0.1)
    time.sleep(0.1)
    assert not waiters.lives(client, child)
    waiters.declare_dead(client, child)
    from tasks.watch import declared_dead

    assert declared_dead(client.read_flow_run(child.id).state), "it may say that it lives"


def test_child_that_somebody_else_cancelled_is_started_anew_but_not_for_ever(
    shared, monkeypatch, tmp_path
):
    from prefect.states import Cancelled

    from rlhf_core.errors import JobFailed
    from rlhf_core.jobs import ImportModelJob
    from tasks.launchers import Launch, work_pool

    client = shared._client
    started = []

    def create(*_: object, **what: object):
        key = {"tags": what["tags"], "idempotency_key": what["idempotency_key"]}
        child = client.create_flow_run_from_deployment(shared.deployment, **key)
        client.set_flow_run_state(child.id, Cancelled(), force=True)
        started.append(child.id)
        return child

    monkeypatch.setattr(shared, "_create", create)
    deployment = client.read_deployment(shared.deployment)
    monkeypatch.setattr(client, "read_deployment_by_name", lambda _: deployment)
    monkeypatch.setattr(work_pool, "POLL_SECONDS", 0.01)
    job = ImportModelJob(source=str(uuid4()))
    launch = Launch("model", {tmp_path: job}, f"file://{tmp_path}", tmp_path / "log")
    with pytest.raises(JobFailed, match="cancelled 3 times, not by this pipeline"):
        shared.run(launch, shared.said.append, lambda line: None)
    assert len(set(started)) == 3
    assert "starting anew" in " ".join(shared.said)


# --------------------------------------------------------------------------- automations


def test_automations_that_have_not_changed_keep_their_identity(prefect_server):
    """A new identity forgets which runs send heartbeats."""
    from prefect.client.orchestration import get_client

    from flows import automations

    def identity():
        name = {"automations": {"name": {"any_": [automations.lost_runs().name]}}}
        [found] = client.request("POST", "/automations/filter", json=name).json()
        return found["id"], found["trigger"]["id"]

    client = get_client(sync_client=True)
    automations.apply()
    before = identity()
    client.request("PATCH", f"/automations/{before[0]}", json={"enabled": False})
    automations.apply()
    assert identity() == before
    [found] = client.read_automations_by_name(automations.lost_runs().name)
    assert not found.enabled, "as chosen in the UI"
    other = automations.lost_runs()
    other.description = "changed"
    client.update_automation(before[0], other)
    automations.apply()
    [found] = client.read_automations_by_name(automations.lost_runs().name)
    assert found.description == automations.lost_runs().description


# --------------------------------------------------------------------------- start of a system


@pytest.fixture
def on_a_pool(launcher):
    """Makes flow runs in a state on a pool, as a worker of this name has labelled them."""
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.client.schemas.objects import StateType
    from prefect.states import State

    client = launcher._client
    pool = client.create_work_pool(WorkPoolCreate(name=str(uuid4()), type="process")).name
    flow = client.read_deployment(launcher.deployment).flow_id
    deployment = client.create_deployment(flow_id=flow, name=str(uuid4()), work_pool_name=pool)

    def made(state: str, worker: str | None = None, tags: list[str] | None = None) -> UUID:
        run = client.create_flow_run_from_deployment(deployment, tags=tags or [])
        if worker:
            client.update_flow_run_labels(run.id, {"prefect.worker.name": worker})
        # the server ends a run at once that is cancelled before it has run
        for each in ["RUNNING", state] if state == "CANCELLING" else [state]:
            client.set_flow_run_state(run.id, State(type=StateType(each)), force=True)
        return run.id

    launcher.pool, launcher.made = pool, made
    return launcher


def test_runs_that_have_no_process_are_ended_and_no_others(on_a_pool):
    from flows.recovery import recover

    made, client = on_a_pool.made, on_a_pool._client
    lost, cancelled, alive = (made(state, "w-1") for state in ("RUNNING", "CANCELLING", "RUNNING"))
    unlabelled, elsewhere = made("PENDING"), made("RUNNING", "another machine's")
    with subprocess.Popen(
        ["sleep", "60"], env={**os.environ, "PREFECT__FLOW_RUN_ID": str(alive)}
    ) as process:
        ended = {run.id: run for run in recover({on_a_pool.pool: "w-1"})}
        process.kill()
    assert set(ended) == {lost, cancelled, unlabelled}

    def state(run: UUID):
        return client.read_flow_run(run).state

    assert state(lost).is_crashed() and "rlhf retry" in state(lost).message
    assert state(unlabelled).is_crashed()
    assert state(cancelled).is_cancelled()
    assert state(alive).is_running() and state(elsewhere).is_running()


def test_children_that_no_pipeline_waits_for_are_not_started(on_a_pool):
    from flows.recovery import recover
    from tasks.waiters import mark_waiting

    made, client = on_a_pool.made, on_a_pool._client
    dead, waits = made("CRASHED"), made("RUNNING", "another machine's")
    orphan, shared = (
        made("SCHEDULED", tags=[f"job:{key}", f"parent:{dead}"]) for key in ("1" * 32, "2" * 32)
    )
    mark_waiting(client, waits, "2" * 32)
    assert [run.id for run in recover({on_a_pool.pool: "w-1"})] == [orphan]
    assert client.read_flow_run(orphan).state.is_cancelled()
    assert client.read_flow_run(shared).state.is_scheduled()
