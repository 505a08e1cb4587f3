"""`rlhf submit` that waits for its run."""

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.system]


def test_submit_follows_the_log_until_a_stage(system):
    system.plan()
    arguments = ["--preset", "smoke", "--set", "seed=1101", "--set", "name=followed"]
    said = system.rlhf("submit", *arguments, "--until", "sft", "--follow")
    assert "sft: done in" in said and "reward" not in said
    assert "Beginning flow run" not in said, "no boilerplate"
    run = said.splitlines()[0].rpartition("/")[2]
    assert system.run(run)["name"] == "followed"
    assert list(system.tasks(run)) == ["preflight", "model", "data", "sft", "report"]


def test_submit_that_waits_fails_with_its_run(system):
    system.plan(data=["data"])
    said = system.rlhf("submit", "--preset", "smoke", "--set", "seed=1102", "--wait", code=1)
    assert "The run ended in the state DataError: data failed: stub ran into data" in said
