"""The `work_pool` launcher against a real server; with workers: tests/system."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
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


def test_deployments_of_one_flow_do_not_share_children(launcher):
    client, key = launcher._client, str(uuid4())
    flow = client.read_deployment(launcher.deployment).flow_id
    other = client.create_deployment(flow_id=flow, name=str(uuid4()))
    first = launcher._create(launcher.deployment, key)
    assert launcher._create(launcher.deployment, key).id == first.id
    assert launcher._create(other, key).deployment_id == other


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
    assert not watch._must_stop(client)
    shared.leave(1)
    assert client.read_flow_run(shared.child.id).state.is_cancelling()
    client.set_flow_run_state(shared.pipelines[1], Cancelled(), force=True)
    assert watch._must_stop(client)


def test_watching_a_run_and_its_pipeline_takes_one_request(shared):
    """Every run of a busy server does it all the time."""
    from tasks.watch import _Watch

    asked = []
    shared._client._client.event_hooks["request"].append(lambda request: asked.append(request.url))
    try:
        assert not _Watch(shared.child.id, shared.pipelines[0], shared.key)._must_stop(
            shared._client
        )
    finally:
        shared._client._client.event_hooks["request"].pop()
    assert len(asked) == 1, asked


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
        key = {"tags": what["tags"], "idempotency_key": what["key"]}
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


def test_job_that_has_ended_since_the_store_was_asked_is_not_started_again(
    shared, monkeypatch, tmp_path
):
    """Its pipeline found no result, and then no running child."""
    from prefect.states import Completed

    from rlhf_core.jobs import ImportModelJob
    from rlhf_core.runtime.launches import launch_id
    from rlhf_core.store import open_store
    from tasks.launchers import Launch

    job, store = ImportModelJob(source=str(uuid4())), open_store(str(tmp_path))
    made = store.publish_derived(kind="model", files={"a": b"a"})
    store.commit_stage(job.key(), made)
    child = shared._client.create_flow_run_from_deployment(
        shared.deployment, tags=[f"job:{launch_id([job])}"], state=Completed()
    )
    monkeypatch.setattr(shared, "_create", None)
    launch = Launch("model", {tmp_path: job}, store.url, tmp_path / "log")
    [outcome] = shared.run(launch, shared.said.append, lambda line: None)
    assert outcome.artifact == made.digest
    assert str(child.id) in shared.said[0]


# --------------------------------------------------------------------------- the queue


@pytest.fixture
def queue(launcher, monkeypatch):
    """Starts stages of pipelines on a pool of their own, and asks which one a worker would take."""
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.states import Running, Scheduled

    from rlhf_core.jobs import ImportModelJob
    from tasks.launchers import Launch, work_pool
    from tasks.launchers.queue import QUEUES
    from tasks.waiters import mark_waiting

    client = launcher._client
    pool = client.create_work_pool(WorkPoolCreate(name=str(uuid4()), type="process")).name
    for name, priority in QUEUES.items():
        if name != "default":
            client.create_work_queue(name, work_pool_name=pool, priority=priority)
    flow = client.read_deployment(launcher.deployment).flow_id
    gpu = client.create_deployment(flow_id=flow, name=str(uuid4()), work_pool_name=pool)
    found = client.read_deployment(gpu)
    monkeypatch.setattr(client, "read_deployment_by_name", lambda _: found)

    def pipeline(author: str, minutes_ago: float) -> UUID:
        due = Scheduled(scheduled_time=datetime.now(UTC) - timedelta(minutes=minutes_ago))
        run = client.create_flow_run_from_deployment(launcher.deployment, state=due).id
        client.set_flow_run_state(run, Running(), force=True)
        mark_waiting(client, run, None, author)
        return run

    def stage(own: UUID, author: str, priority: str = "normal"):
        monkeypatch.setattr(work_pool, "_own_id", lambda: own)
        job = ImportModelJob(source=str(uuid4()))
        launch = Launch("model", {Path("x"): job}, "", Path("log"), priority, author)
        return launcher._find_or_start(uuid4().hex, launch, print)[0].id

    def taken() -> list[UUID]:
        page = f"/work_pools/{pool}/get_scheduled_flow_runs"
        return [UUID(r["flow_run"]["id"]) for r in client.request("POST", page, json={}).json()]

    launcher.launch = lambda author: Launch("m", {}, "", Path("log"), "normal", author)
    launcher.pool, launcher.pipeline, launcher.stage, launcher.taken = pool, pipeline, stage, taken
    return launcher


def test_oldest_pipeline_goes_first_but_one_of_each_author_and_priority_before_all(queue):
    ada_1, ada_2, bob = (queue.pipeline(*of) for of in (("ada", 60), ("ada", 50), ("bob", 40)))
    later = queue.stage(bob, "bob")
    further = queue.stage(ada_2, "ada")
    first = queue.stage(ada_1, "ada")  # asked for last
    low, urgent = queue.stage(ada_1, "ada", "low"), queue.stage(bob, "bob", "high")
    assert queue.taken() == [urgent, first, later, further, low]


def test_stage_moves_up_when_its_pipeline_is_the_oldest_of_its_author(queue):
    from prefect.states import Completed

    client, launch = queue._client, queue.launch("eve")
    older, own = queue.pipeline("eve", 60), queue.pipeline("eve", 50)
    child = client.read_flow_run(queue.stage(own, "eve"))
    queue._move_up(child, launch)
    assert client.read_flow_run(child.id).state.is_scheduled(), "it has its place"
    client.set_flow_run_state(older, Completed(), force=True)
    queue._move_up(child, launch)
    state = client.read_flow_run(child.id).state
    assert state.is_cancelled() and state.message == "moved up in the queue"
    again = client.read_flow_run(queue.stage(own, "eve"))
    assert again.work_queue_name == "default"


def test_queue_of_more_runs_than_the_server_gives_at_once_is_read_to_its_end(queue, monkeypatch):
    from tasks import flow_runs
    from tasks.launchers.queue import place_of

    monkeypatch.setattr(flow_runs, "PAGE", 2)
    own = queue.pipeline("gil", 60)
    stages = [queue.stage(own, "gil") for _ in range(4)]
    found = flow_runs.of_states(queue._client, ["SCHEDULED"], queue.pool)
    assert {run.id for run in found} == set(stages)
    assert place_of(queue._client, found[0]).of == 4


def test_place_and_time_come_from_the_queue_and_from_past_stages(queue):
    from prefect.client.schemas.objects import StateType
    from prefect.states import State

    from tasks.launchers.queue import place_of, why_it_waits

    client = queue._client  # authors of their own: those of other tests have runs in progress
    old, new = queue.pipeline("dan", 60), queue.pipeline("fay", 50)
    second, first = queue.stage(new, "fay"), queue.stage(old, "dan")
    place = place_of(client, client.read_flow_run(second))
    assert (place.place, place.of, place.seconds) == (2, 2, None), "nothing is known"
    assert place_of(client, client.read_flow_run(first)).seconds == 0.0, "nothing runs"

    done = queue.stage(old, "dan")
    begun = datetime.now(UTC) - timedelta(seconds=100)
    for kind, when in (("RUNNING", begun), ("COMPLETED", begun + timedelta(seconds=80))):
        state = State(type=StateType(kind), timestamp=when)
        client.set_flow_run_state(done, state, force=True)
    took = client.read_flow_run(done).total_run_time.total_seconds()
    place = place_of(client, client.read_flow_run(second))
    assert place.seconds == pytest.approx(took, abs=1)
    assert "no worker of pool" in why_it_waits(client, client.read_flow_run(second))


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
