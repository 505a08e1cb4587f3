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


def test_work_pool_launcher_adds_under_twelve_seconds_a_stage(system):
    """The stand-ins do nothing, so that all the time is the orchestration's."""
    system.plan()
    run = system.wait(system.submit("seed=702"), "COMPLETED")
    stages = len(system.children(run["id"]))
    assert stages == 7
    each = seconds(run) / stages
    print(f"{seconds(run):.1f} s for {stages} stages: {each:.1f} s each")
    assert each < 12


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
