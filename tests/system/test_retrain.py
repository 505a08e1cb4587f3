"""Scheduled retraining: nothing without new data, and nothing worse is published."""

import json
import time
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
import yaml

from tests.system.conftest import FINAL, kill_with_family, until

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
    }  # fmt: skip
    return path, config


def deployment(system):
    return system.get("/deployments/name/rlhf-retrain/retrain")["id"]


def start(system, config, **parameters):
    body = {"parameters": {"settings": yaml.safe_dump(config), **parameters}}
    return system.post(f"/deployments/{deployment(system)}/create_flow_run", body)["id"]


def retraining(system):
    """Runs that hold the deployment's only slot."""
    states = {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}
    body = {"flows": {"name": {"any_": ["rlhf-retrain"]}}, "flow_runs": {"state": states}}
    return system.post("/flow_runs/filter", body)


def test_trains_then_finds_nothing_new_then_trains_again(system, data):
    system.plan()
    path, config = data
    first = system.wait(start(system, config), "COMPLETED")
    assert first["state_name"] == "Promoted"
    assert "published" in system.rlhf("artifacts", "list", "--kind", "published")

    # Now by a schedule, seconds apart.
    schedule = {"schedule": {"interval": 15, "timezone": "UTC"}, "active": True,
                "parameters": {"settings": yaml.safe_dump(config)}}  # fmt: skip
    jobs = len(system.children())
    made = system.post(f"/deployments/{deployment(system)}/schedules", [schedule])

    def scheduled():
        body = {
            "flows": {"name": {"any_": ["rlhf-retrain"]}}, "sort": "START_TIME_ASC",
            "flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}},
        }  # fmt: skip
        return [r for r in system.post("/flow_runs/filter", body) if r["auto_scheduled"]]

    two = until(lambda: scheduled() if len(scheduled()) >= 2 else None, 120)
    assert {r["state_name"] for r in two} <= {"NothingNew", "Skipped"}  # skipped: machine is slow
    told = [r["state"]["message"] for r in two if r["state_name"] == "NothingNew"]
    assert told
    for message in told:
        assert "no new data since" in message
        took = float(message.rpartition("(")[2].removesuffix(" s)"))
        assert took < 10, "half a second on an idle machine"
    assert len(system.children()) == jobs, "no stage was started"
    with path.open("a") as file:
        file.write(json.dumps({"prompt": "Something new", "completion": "yes"}) + "\n")
    trained = until(
        lambda: [r for r in scheduled() if r["state_name"] not in ("NothingNew", "Skipped")],
        240, "a training",
    )  # fmt: skip
    system.ask("DELETE", f"/deployments/{deployment(system)}/schedules/{made[0]['id']}")
    until(lambda: not retraining(system), 60, "the end of what the schedule has begun")
    assert trained[0]["state_name"] == "Promoted"


def test_model_that_misses_a_gate_becomes_a_candidate(system, data):
    system.plan()
    _, config = data

    def champion():
        return json.loads(system.rlhf("models", "show", "retrained", "--json"))["digest"]

    before = champion()
    run = start(system, {**config, "seed": 302}, gates={"max_kl": 0.001})
    found = system.wait(run, "COMPLETED")
    assert found["state_name"] == "Rejected"
    assert "max_kl" in found["state"]["message"]
    assert champion() == before
    lines = system.rlhf("models", "list", "retrained", "--json").splitlines()
    newest = json.loads(lines[-1])
    assert newest["state"] == "candidate" and "max_kl" in newest["reason"]


def test_second_retraining_at_the_same_time_is_refused_or_waits_as_deployed(system, data):
    _, config = data
    system.plan(sft=["wait:20"])
    ids = [start(system, {**config, "seed": 310 + i}) for i in range(2)]
    states = sorted(system.wait(run, "COMPLETED", "CANCELLED")["state_type"] for run in ids)
    assert states == ["CANCELLED", "COMPLETED"]

    options = {"concurrency_options": {"collision_strategy": "ENQUEUE"}}
    address = f"/deployments/{deployment(system)}"
    system.ask("PATCH", address, options)
    try:
        ids = [start(system, {**config, "seed": 320 + i}) for i in range(2)]
        first, second = sorted(
            (system.wait(run, "COMPLETED", seconds=300) for run in ids),
            key=lambda run: run["end_time"],
        )
        # A queued run is "running" for a moment before it is sent back; the last time counts.
        states = system.get(f"/flow_run_states/?flow_run_id={second['id']}")
        began = max(s["timestamp"] for s in states if s["type"] == "RUNNING")
        assert began >= first["end_time"]
    finally:
        options["concurrency_options"]["collision_strategy"] = "CANCEL_NEW"
        system.ask("PATCH", address, options)


def scheduled(system, since):
    """Runs that a schedule has made, due since a time."""
    body = {"flows": {"name": {"any_": ["rlhf-retrain"]}},
            "flow_runs": {"expected_start_time": {"after_": f"{since:%FT%TZ}"}}}  # fmt: skip
    return [r for r in system.post("/flow_runs/filter", body) if r["auto_scheduled"]]


def test_missed_schedule_is_made_good_once(system, data):
    """The worker is away while three runs come due."""
    _, config = data
    config = {**config, "seed": 330}
    system.plan()
    address = f"/deployments/{deployment(system)}"
    system.ask("PATCH", address, {"concurrency_limit": None})  # all of them begin at once
    with system.paused():
        for process in system.processes("worker start", "--pool control"):
            kill_with_family(process)
        for lead in (15, 60):  # the server makes no run that is due already: a slow one needs more
            began = datetime.now(UTC) + timedelta(seconds=lead)
            rule = f"DTSTART:{began:%Y%m%dT%H%M%S}\nRRULE:FREQ=SECONDLY;INTERVAL=8;COUNT=4"
            schedule = {"schedule": {"rrule": rule, "timezone": "UTC"}, "active": True,
                        "parameters": {"settings": yaml.safe_dump(config)}}  # fmt: skip
            made = system.post(f"{address}/schedules", [schedule])[0]["id"]
            time.sleep(max(0, (began - datetime.now(UTC)).total_seconds()) + 30)
            if len(scheduled(system, began)) >= 3:
                break
            system.ask("DELETE", f"{address}/schedules/{made}")

    def ended():
        runs = scheduled(system, began)
        done = [r for r in runs if r["state_type"] in FINAL]
        return done if len(done) == len(runs) >= 3 else None

    try:
        names = sorted(run["state_name"] for run in until(ended, 280, "the end of all"))
    finally:
        system.ask("PATCH", address, {"concurrency_limit": 1})
        system.ask("DELETE", f"{address}/schedules/{made}")
    # A run that begins after the first one's end, on a slow machine, finds nothing new.
    assert names.count("Promoted") == 1
    assert set(names) <= {"Promoted", "Skipped", "NothingNew"}


def test_new_data_starts_a_retraining_by_its_event(system, data):
    """By the watcher, and as a webhook would send it."""
    path, config = data
    system.plan()
    trigger = {
        "name": "test: new data", "enabled": True,
        "trigger": {"type": "event", "posture": "Reactive", "threshold": 1,
                    "expect": ["rlhf.data.new"], "match": {"prefect.resource.id": "rlhf.data.*"}},
        "actions": [{"type": "run-deployment", "deployment_id": deployment(system),
                     "parameters": {"settings": yaml.safe_dump({**config, "seed": 340})}}],
    }  # fmt: skip
    automation = system.post("/automations/", trigger)["id"]

    def trained(seed):
        body = {"flows": {"name": {"any_": ["rlhf-retrain"]}}}
        return [r for r in system.post("/flow_runs/filter", body)
                if f"seed: {seed}\n" in r["parameters"].get("settings", "")]  # fmt: skip

    watcher = system.get("/deployments/name/rlhf-watch-data/watch-data")["id"]
    watch = {"parameters": {"source": str(path)}}
    names = []
    for _ in range(3):
        run = system.post(f"/deployments/{watcher}/create_flow_run", watch)["id"]
        names.append(system.wait(run, "COMPLETED")["state_name"])
        if len(names) == 2:
            with path.open("a") as file:
                file.write(json.dumps({"prompt": "More", "completion": "news"}) + "\n")
    assert names == ["Completed", "NothingNew", "NewData"]
    [first] = until(lambda: trained(340), 60, "the retraining")
    assert system.wait(first["id"], "COMPLETED")["state_name"] == "Promoted"

    event = {"id": str(uuid4()), "occurred": datetime.now(UTC).isoformat(),
             "event": "rlhf.data.new",
             "resource": {"prefect.resource.id": "rlhf.data.upstream"}}  # fmt: skip
    system.post("/events", [event])
    until(lambda: len(trained(340)) == 2, 60, "the second one")
    second = next(r for r in trained(340) if r["id"] != first["id"])
    assert system.wait(second["id"], "COMPLETED")["state_name"] == "NothingNew"
    system.ask("DELETE", f"/automations/{automation}")
