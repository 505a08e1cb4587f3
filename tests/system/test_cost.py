"""What the orchestration costs by itself: measured, printed, and held to a bound."""

import json
import time
from datetime import datetime

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.system]


def seconds(run):
    begin, end = (datetime.fromisoformat(run[k]) for k in ("start_time", "end_time"))
    return (end - begin).total_seconds()


def test_local_launcher_adds_under_ten_seconds_to_the_stages(system):
    began = time.monotonic()
    system.rlhf("run", "--preset", "smoke", "--set", "seed=701")
    took = time.monotonic() - began
    record = json.loads(system.rlhf("runs", "--json").splitlines()[0])
    assert record["config"]["seed"] == 701
    stages = record["stages"].values()
    assert not any(stage["reused"] for stage in stages)
    added = took - sum(stage["seconds"] for stage in stages)
    print(f"{took:.1f} s, of which {added:.1f} s beside the {len(stages)} stages")
    assert added < 10


def test_work_pool_launcher_starts_a_stage_within_four_seconds(system):
    """From the stage's submission in the pipeline to the first line of its job. The stand-ins do
    nothing, so that all the time is the orchestration's."""
    system.plan()
    run = system.wait(system.submit("seed=702"), "COMPLETED")
    stages = system.children(run["id"])
    assert len(stages) >= 7
    took = sorted(first_line(system, child) - moment(child["created"]) for child in stages)
    each = seconds(run) / len(stages)
    median = took[len(took) // 2].total_seconds()
    print(f"first line after {median:.1f} s (median of {len(stages)}), {each:.1f} s for each stage")
    assert median < 4
    assert each < 8


def first_line(system, child):
    body = {"logs": {"flow_run_id": {"any_": [child["id"]]}}, "sort": "TIMESTAMP_ASC", "limit": 200}
    lines = system.post("/logs/filter", body)
    return min(moment(line["timestamp"]) for line in lines if "stub runs" in line["message"])


def moment(text):
    return datetime.fromisoformat(text)


def test_idle_control_worker_stays_under_250_megabytes(system):
    [worker] = system.processes("worker start", "--pool control")
    used = worker.memory_info().rss / 1e6
    for name, words in (
        ("server", ["flows.api_server"]), ("S3 server", ["weed"]),
        ("supervisor", ["flows.cli.supervisor"]), ("control worker", ["--pool control"]),
        ("gpu worker", ["--pool gpu"]),
    ):  # fmt: skip
        rss = sum(p.memory_info().rss for p in system.processes(*words)) / 1e6
        print(f"{name}: {rss:.0f} MB")
    assert used < 250
