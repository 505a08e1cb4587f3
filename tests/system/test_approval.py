"""A person's word before publishing, given through the server's interface."""

import pytest

from tests.system.conftest import until

pytestmark = [pytest.mark.slow, pytest.mark.system]


@pytest.mark.parametrize(("decision", "state"), [("approve", "Completed"), ("reject", "Rejected")])
def test_run_waits_for_the_decision(system, decision, state):
    system.plan()
    run = system.submit("seed=401", "publish.approval=manual", f"publish.name=asked-{decision}")
    until(lambda: system.run(run)["state_type"] == "PAUSED", 200, "the question")
    until(lambda: system.run(run)["state_name"] == "WaitingForApproval", 30, "the name")
    body = {"run_input": {"decision": decision, "reason": "because"}}
    assert system.post(f"/flow_runs/{run}/resume", body)["status"] == "ACCEPT"
    found = until(lambda: r if (r := system.run(run))["state_type"] == "COMPLETED" else None, 120)
    assert found["state_name"] == state
    assert ("publish" in system.tasks(run)) == (decision == "approve")
    if decision == "reject":
        assert found["state"]["message"] == "not published: because"
    listed = system.rlhf("runs")
    assert "completed" in next(line for line in listed.splitlines() if run[:8] in line)
