"""Scheduled retraining: nothing without new data, and nothing worse is published."""

import json

import pytest

from tests.system.conftest import until

pytestmark = [pytest.mark.slow, pytest.mark.system]


@pytest.fixture(scope="module")
def data(system):
    """A data file that grows, and the settings that read it."""
    path = system.folder / "talk.jsonl"
    rows = [{"prompt": f"Say word {i}", "completion": f"word {i}"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"source": str(path)}
    config = {
        "preset": "smoke", "seed": 301, "name": "retrained",
        "data": {"sft": source, "prompts": source}, "publish": {"name": "retrained"},
        "launcher": {"type": "work_pool"},
    }  # fmt: skip
    return path, config


def deployment(system):
    return system.get("/deployments/name/rlhf-retrain/retrain")["id"]


def start(system, config, **parameters):
    body = {"parameters": {"config": config, **parameters}}
    return system.post(f"/deployments/{deployment(system)}/create_flow_run", body)["id"]


def test_trains_then_finds_nothing_new_then_trains_again(system, data):
    system.plan()
    path, config = data
    first = system.wait(start(system, config), "COMPLETED")
    assert first["state_name"] == "Promoted"
    assert "published" in system.rlhf("artifacts", "list", "--kind", "published")

    # Now by a schedule, seconds apart.
    schedule = {"schedule": {"interval": 15, "timezone": "UTC"}, "active": True,
                "parameters": {"config": config}}  # fmt: skip
    made = system.post(f"/deployments/{deployment(system)}/schedules", [schedule])

    def scheduled():
        body = {
            "flows": {"name": {"any_": ["rlhf-retrain"]}}, "sort": "START_TIME_ASC",
            "flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}},
        }  # fmt: skip
        return [r for r in system.post("/flow_runs/filter", body) if r["auto_scheduled"]]

    two = until(lambda: scheduled() if len(scheduled()) >= 2 else None, 120)
    assert {r["state_name"] for r in two} == {"NothingNew"}
    assert all("no new data since" in r["state"]["message"] for r in two)
    with path.open("a") as file:
        file.write(json.dumps({"prompt": "Something new", "completion": "yes"}) + "\n")
    trained = until(
        lambda: [r for r in scheduled() if r["state_name"] != "NothingNew"], 240, "a training"
    )
    system.api.delete(f"/deployments/{deployment(system)}/schedules/{made[0]['id']}")
    assert trained[0]["state_name"] == "Promoted"


def test_model_that_misses_a_gate_is_not_published(system, data):
    system.plan()
    _, config = data
    before = system.rlhf("artifacts", "list", "--kind", "published")
    run = start(system, {**config, "seed": 302}, gates={"max_kl": 0.001})
    found = system.wait(run, "COMPLETED")
    assert found["state_name"] == "Rejected"
    assert "max_kl" in found["state"]["message"]
    assert system.rlhf("artifacts", "list", "--kind", "published") == before
