"""A system that stops in the middle of runs, and starts again; twins. Stages are stand-ins."""

import subprocess
import sys

import pytest

from tests.system.conftest import kill_with_family, until
from tests.system.test_faults import started

pytestmark = [
    pytest.mark.slow,
    pytest.mark.system,
    pytest.mark.usefixtures("stand_ins"),
]

SHORT = "stages=[sft]"


def supervisor(system):
    [found] = system.processes("flows.cli.supervisor")
    return found


def retried(system, run):
    """The run goes on without a second child of what was done."""
    system.plan()
    system.rlhf("retry", run[:8])
    until(lambda: system.run(run)["run_count"] == 2, 60)
    system.wait(run, "COMPLETED")


def test_start_ends_the_runs_that_have_no_process(system):
    system.plan(sft=["wait:600"])
    run = system.submit(SHORT, "seed=801")
    started(system)
    kill_with_family(supervisor(system))
    until(lambda: not system.processes("prefect"), 30, "their end")
    system.up()
    [child] = system.children(run, "sft")
    for found in (system.run(run), child):
        assert found["state_type"] == "CRASHED"
        assert "its process is gone" in found["state"]["message"]
    assert f"rlhf retry {run[:8]}" in system.run(run)["state"]["message"]
    retried(system, run)
    assert len(system.children(run, "model")) == 1


def test_down_waits_for_checkpoints_and_its_runs_can_go_on(system):
    system.plan(sft=["wait:600"])
    run = system.submit(SHORT, "seed=802", "name=in-the-middle")
    started(system)
    down = subprocess.run(
        [sys.executable, "-m", "flows.cli.main", "down"], cwd=system.folder, text=True,
        env=system.environment, capture_output=True, timeout=180,
    )  # fmt: skip
    assert f"in progress: in-the-middle ({run[:8]})" in down.stderr
    assert "not ended in time" not in down.stderr
    assert "stopped" in down.stdout
    assert system.processes() == []
    system.up()
    state = system.run(run)["state"]
    assert (state["type"], state["name"]) == ("CRASHED", "Stopped")
    assert "at a checkpoint" in state["message"]
    retried(system, run)


def test_worker_that_is_killed_before_a_process_has_started_keeps_no_slot(system):
    """As far as the server knows, the run is on its way."""
    [deployment] = system.post("/deployments/filter", {"deployments": {"name": {"any_": ["rlhf"]}}})
    run = system.post(
        f"/deployments/{deployment['id']}/create_flow_run", {"state": {"type": "PENDING"}}
    )["id"]
    [worker] = system.processes("worker start", "--pool control")
    kill_with_family(worker)
    until(lambda: system.run(run)["state_type"] == "CRASHED", 60)
    system.rlhf("retry", run[:8])  # it has no record in the store
    until(lambda: system.run(run)["run_count"] == 1, 60)
    system.rlhf("cancel", run[:8])


def test_what_was_switched_on_stays_on_when_the_system_is_deployed_again(system):
    [deployment] = system.post(
        "/deployments/filter", {"deployments": {"name": {"any_": ["retrain"]}}}
    )
    [schedule] = deployment["schedules"]
    path = f"/deployments/{deployment['id']}/schedules"

    def automations():
        return {a["name"]: a for a in system.post("/automations/filter")}

    new_data, lost = "rlhf: new data starts a retraining", "a run without heartbeats has crashed"
    [lost] = [name for name in automations() if name.endswith(lost)]
    before = automations()
    system.ask("PATCH", f"{path}/{schedule['id']}", {"active": True})
    system.ask("PATCH", f"/automations/{before[new_data]['id']}", {"enabled": True})
    try:
        subprocess.run(
            [sys.executable, "-m", "flows.deploy", "2"], cwd=system.folder, check=True,
            env=system.environment
            | {"PREFECT_API_URL": f"{system.url}/api", "PREFECT_API_AUTH_STRING": system.log_in()},
            capture_output=True,
        )  # fmt: skip
        [schedule] = system.get(path)
        assert schedule["active"]
        after = automations()
        assert after[new_data]["enabled"]
        assert after[lost]["trigger"]["id"] == before[lost]["trigger"]["id"]
    finally:
        system.ask("PATCH", f"{path}/{schedule['id']}", {"active": False})
        found = automations()[new_data]["id"]
        system.ask("PATCH", f"/automations/{found}", {"enabled": False})


def test_cancelled_twin_leaves_the_shared_stage_to_the_other_one(system):
    system.plan(sft=["wait:45"])
    first, second = (system.submit(SHORT, "seed=803", f"name=twin-{i}") for i in (1, 2))
    started(system)
    joined = "started earlier"
    until(lambda: joined in "".join(system.logs(second) + system.logs(first)), 60)
    [child] = system.children(stage="sft", run=first) + system.children(stage="sft", run=second)
    owner, twin = (first, second) if f"parent:{first}" in child["tags"] else (second, first)
    system.post(f"/flow_runs/{owner}/set_state", {"state": {"type": "CANCELLING"}})
    until(lambda: system.run(owner)["state_type"] == "CANCELLED", 60)
    system.wait(twin, "COMPLETED")
    assert system.run(child["id"])["state_type"] == "COMPLETED"
    stages = [t for c in system.children(twin) for t in c["tags"]]
    assert "stage:sft" not in stages, "the owner's child was enough"


def test_stage_that_somebody_cancels_is_started_anew(system):
    system.plan(sft=["wait:600"])
    run = system.submit(SHORT, "seed=804")
    started(system)
    system.plan()
    [child] = system.children(run, "sft")
    system.post(f"/flow_runs/{child['id']}/set_state", {"state": {"type": "CANCELLING"}})
    system.wait(run, "COMPLETED")
    assert [c["state_type"] for c in system.children(run, "sft")] == ["CANCELLED", "COMPLETED"]
    assert any("somebody else cancelled it" in line for line in system.logs(run))
