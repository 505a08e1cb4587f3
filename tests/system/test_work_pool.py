"""Pipelines on workers: retry, cancel, shared work, lost workers. Most stages are stand-ins."""

import json
import re
import subprocess
import sys
import time

import pytest

from tests.system.conftest import until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.system,
    pytest.mark.usefixtures("stand_ins"),
]

STAGES = ("model", "data", "sft", "label", "reward", "ppo", "evaluate")


def test_stages_run_as_flow_runs_on_the_gpu_pool_and_are_reused(system):
    first = system.submit("seed=101")
    system.wait(first, "COMPLETED")
    children = system.children(first)
    assert [c["state_type"] for c in children] == ["COMPLETED"] * len(STAGES)
    assert {c["work_pool_name"] for c in children} == {"gpu"}
    assert system.run(first)["work_pool_name"] == "control"
    assert "stub runs ppo" in system.logs(first), "the child's lines reach the parent's log"
    assert any(line.startswith("ppo: step 3/3  ") for line in system.logs(first))
    names = {t: r["state_name"] for t, r in system.tasks(first).items()}
    assert names["ppo"] == "Completed"

    second = system.submit("seed=101")
    system.wait(second, "COMPLETED")
    assert system.children(second) == []
    reused = system.tasks(second)
    for stage in STAGES:
        assert reused[stage]["state_name"] == "Cached"
        assert reused[stage]["state"]["message"].startswith("reused ")


def test_data_error_is_not_retried_and_names_its_reason(system):
    system.plan(sft=["data"])
    run = system.submit("seed=102")
    failed = system.wait(run, "FAILED")
    assert "stub ran into data" in failed["state"]["message"]
    [child] = system.children(run, "sft")
    assert child["state_name"] == "DataError"
    assert "Traceback" not in "\n".join(system.logs(run) + system.logs(child["id"]))


def test_what_is_left_of_a_collapsed_policy_is_a_candidate_wherever_its_ranks_were(system):
    system.plan(ppo=["collapse_late"])
    run = system.submit("seed=120", "publish.name=collapsed")
    failed = system.wait(run, "FAILED")
    [child] = system.children(run, "ppo")
    assert child["state_name"] == "PolicyCollapsed"
    assert "stub ran into collapse" in failed["state"]["message"]
    assert "version 1 of collapsed, a candidate" in failed["state"]["message"]
    [line] = system.rlhf("models", "list", "collapsed", "--json").splitlines()
    version = json.loads(line)
    assert (version["state"], version["reason"]) == ("candidate", "collapsed at step 9")
    assert f"rlhf chat {version['digest'][:12]}" in failed["state"]["message"]


def test_lost_process_is_retried_a_bounded_number_of_times(system):
    system.plan(sft=["silent_kill"])
    run = system.submit("seed=103")
    system.wait(run, "FAILED")
    assert [c["state_name"] for c in system.children(run, "sft")] == ["ProcessLost"] * 3
    lines = "\n".join(system.logs(run))
    assert "attempt 2 of 3 in 5 s" in lines
    assert "attempt 3 of 3 in 30 s" in lines


def test_failed_run_is_retried_and_goes_on(system):
    system.plan(ppo=["data"])
    run = system.submit("seed=104")
    system.wait(run, "FAILED")
    before = {c["id"]: c["end_time"] for c in system.children(run)}
    system.plan()
    record = run[:8]
    [run_id] = [line.split()[0] for line in system.rlhf("runs").splitlines() if record in line]
    assert "scheduled: http://" in system.rlhf("retry", run_id)
    until(lambda: system.run(run)["run_count"] == 2, 60)
    assert system.wait(run, "COMPLETED")["run_count"] == 2
    after = {c["id"]: c["end_time"] for c in system.children(run)}
    assert before.items() <= after.items(), "what was done is untouched"
    new = [c for c in system.children(run) if c["id"] not in before]
    assert sorted(t.removeprefix("stage:") for c in new for t in c["tags"] if "stage:" in t) == [
        "evaluate",
        "ppo",
    ]
    assert "completed" in next(x for x in system.rlhf("runs").splitlines() if run_id in x)


def test_killed_ranks_of_a_real_ppo_go_on_from_their_checkpoint(system):
    system.for_real()
    run = system.submit("seed=108", "ppo.steps=60")

    def training():
        found = system.children(run, "ppo")
        lines = system.logs(found[0]["id"]) if found else []
        return any(re.search("step ([2-9]|[1-4][0-9])/60", line) for line in lines)

    until(training, 300, "the second step of PPO")
    for rank in system.ranks():
        rank.kill()
    system.wait(run, "COMPLETED")
    first, second = system.children(run, "ppo")
    assert (first["state_name"], second["state_name"]) == ("ProcessLost", "Completed")
    lines = "\n".join(system.logs(second["id"]))
    step = int(re.search(r"going on from the checkpoint after step (\d+)", lines)[1])
    assert step >= 1
    for stage in ("sft", "reward"):
        assert len(system.children(run, stage)) == 1


def cancellations_told_to_a_new_worker(system, run: str) -> str:
    code = f"""
import asyncio
from uuid import UUID
from prefect._internal.observers import FlowRunCancellingObserver

async def main():
    told = []
    observer = FlowRunCancellingObserver(told.append)
    observer.add_in_flight_flow_run_id(UUID("{run}"))
    async with observer:
        await asyncio.sleep(3)
    print(len(told))

asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True,
        env={**system.environment, "PREFECT_API_URL": f"{system.url}/api",
             "PREFECT_API_AUTH_STRING": system.log_in()},
    )  # fmt: skip
    return done.stdout.strip()


def test_cancelled_run_leaves_no_process(system):
    system.plan(sft=["stubborn"])
    run = system.submit("seed=105")
    until(lambda: list(system.pids.iterdir()), 90, "the stage")
    ranks = system.stand_ins()
    assert ranks
    began = time.monotonic()
    record = next(x for x in system.rlhf("runs").splitlines() if run[:8] in x).split()[0]
    assert system.rlhf("cancel", record).strip() == "Cancelled"
    until(lambda: not any(rank.is_running() for rank in ranks), 30 - (time.monotonic() - began))
    assert time.monotonic() - began < 30
    until(lambda: system.children(run, "sft")[0]["state_type"] == "CANCELLED", 30)
    assert "cancelled" in next(x for x in system.rlhf("runs").splitlines() if record in x)

    # A worker asks the server for events that it missed. That cancellation among them would end
    # the retry whenever the answer comes after its process was started.
    assert cancellations_told_to_a_new_worker(system, run) == "0"
    system.plan()
    system.rlhf("retry", record)
    system.wait(run, "SCHEDULED", "PENDING", "RUNNING", seconds=10)
    system.wait(run, "COMPLETED")


def test_two_pipelines_train_what_they_share_once(system):
    system.plan(sft=["wait:4"])
    first, second = (system.submit("seed=106", f"name=twin-{i}") for i in (1, 2))
    for run in (first, second):
        system.wait(run, "COMPLETED")
    shared = system.children(first) + system.children(second)
    stages = sorted(t for c in shared for t in c["tags"] if t.startswith("stage:"))
    assert stages == sorted(f"stage:{stage}" for stage in STAGES)


def test_ten_pipelines_on_two_slots_never_run_more_than_two_jobs(system):
    system.plan(sft=["wait:4"], ppo=["wait:6"])
    runs = [system.submit("seed=107", f"ppo.kl_coef={0.1 + i / 100}") for i in range(10)]
    most = 0
    while any(system.run(run)["state_type"] not in ("COMPLETED", "FAILED") for run in runs):
        children = system.children()
        running = [c for c in children if c["state_type"] in ("RUNNING", "CANCELLING")]
        most = max(most, len(running))
        time.sleep(1)
    assert [system.run(run)["state_type"] for run in runs] == ["COMPLETED"] * 10
    assert most == 2
    of_these = [c for run in runs for c in system.children(run)]
    stages = [t for c in of_these for t in c["tags"] if t.startswith("stage:")]
    assert stages.count("stage:sft") == 1, "equal inputs are trained once"
    assert stages.count("stage:ppo") == 10
