"""Workers, pipelines and servers that go away in the middle. Stages are stand-ins."""

import time

import pytest

from tasks.waiters import DECLARED_DEAD
from tests.system.conftest import kill_with_family, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.system,
    pytest.mark.usefixtures("stand_ins"),
]


def started(system):
    until(lambda: list(system.pids.iterdir()), 120, "the stage")
    for path in system.pids.iterdir():
        path.unlink()


def worker(system, pool):
    [found] = system.processes("worker start", f"--pool {pool}")
    return found


@pytest.mark.timeout(500)
def test_lost_gpu_machine_is_found_within_three_minutes_and_another_worker_goes_on(system):
    """Worker, engine and ranks are killed; the supervisor starts another worker."""
    system.plan(reward=["wait:600"])
    run = system.submit("seed=501")
    started(system)
    system.plan()  # the next attempt is quick
    kill_with_family(worker(system, "gpu"))
    killed = time.monotonic()
    until(lambda: system.children(run, "reward")[0]["state_type"] == "CRASHED", 200, "its end")
    print(f"found dead after {time.monotonic() - killed:.0f} s")
    assert time.monotonic() - killed < 180
    system.wait(run, "COMPLETED")
    assert [c["state_type"] for c in system.children(run, "reward")] == ["CRASHED", "COMPLETED"]
    assert "the worker or its process was lost" in "\n".join(system.logs(run))


def test_killed_worker_alone_costs_nothing(system):
    """Its engine goes on with the job; the next worker takes the next one."""
    system.plan(reward=["wait:8"])
    run = system.submit("seed=502")
    started(system)
    worker(system, "gpu").kill()
    system.wait(run, "COMPLETED")
    assert [c["state_type"] for c in system.children(run, "reward")] == ["COMPLETED"]


def test_retried_pipeline_adopts_the_child_that_still_lives(system):
    system.plan(sft=["wait:45"])
    run = system.submit("seed=503")
    started(system)
    [engine] = [
        p for p in worker(system, "control").children(recursive=True)
        if run in str(p.environ().get("PREFECT__FLOW_RUN_ID", ""))
    ][:1]  # fmt: skip
    kill_with_family(engine)
    # What the automation does after 150 seconds of silence; the worker may have noticed first.
    system.post(f"/flow_runs/{run}/set_state", {"state": {"type": "CRASHED"}, "force": True})
    record = next(x for x in system.rlhf("runs").splitlines() if run[:8] in x).split()[0]
    system.rlhf("retry", record)
    system.wait(run, "COMPLETED", "SCHEDULED")
    until(lambda: system.run(run)["state_type"] == "COMPLETED", 200)
    assert len(system.children(run, "sft")) == 1
    assert any("started earlier" in line for line in system.logs(run))


def test_cancel_reaches_a_run_whose_worker_is_dead(system):
    system.plan(sft=["stubborn"])
    run = system.submit("seed=504")
    until(lambda: list(system.pids.iterdir()), 120, "the stage")
    ranks = system.stand_ins()
    worker(system, "gpu").kill()
    worker(system, "control").kill()
    began = time.monotonic()
    system.post(f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    until(lambda: not any(rank.is_running() for rank in ranks), 30, "the ranks' end")
    print(f"ranks gone after {time.monotonic() - began:.0f} s")
    until(lambda: system.run(run)["state_type"] == "CANCELLED", 60)
    until(lambda: system.children(run, "sft")[0]["state_type"] == "CANCELLED", 60)


@pytest.mark.timeout(400)
def test_server_away_for_a_minute(system):
    system.plan(sft=["wait:75"])
    run = system.submit("seed=505")
    started(system)
    with system.paused():
        [server] = system.processes("flows.api_server")
        kill_with_family(server)
        time.sleep(60)

    def answers():
        try:
            return system.run(run)
        except Exception:
            return None

    until(answers, 60, "the server")
    system.wait(run, "COMPLETED", seconds=250)
    assert len(system.children(run, "sft")) == 1


def test_run_that_was_found_dead_in_error_says_that_it_lives(system):
    """What a server does that was away for longer, and missed the heartbeats."""
    system.plan(sft=["wait:30"])
    run = system.submit("seed=506")
    started(system)
    [child] = system.children(run, "sft")
    for found in (run, child["id"]):
        state = {"type": "CRASHED", "message": f"{DECLARED_DEAD} 150 s: its process was lost"}
        system.post(f"/flow_runs/{found}/set_state", {"state": state, "force": True})
    until(lambda: system.run(run)["state_type"] == "RUNNING", 20)
    until(lambda: system.run(child["id"])["state_type"] == "RUNNING", 20)
    system.wait(run, "COMPLETED")
    assert len(system.children(run, "sft")) == 1
