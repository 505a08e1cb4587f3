"""`rlhf run` as a person sees it, and what is left of it after Ctrl-C or a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from rlhf_core.store import open_store

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]


@pytest.fixture
def command(tmp_path, prefect_server, prefect_database):
    """Starts `rlhf run --preset smoke` on the stand-in; ended afterwards.

    Without a server it starts one, on a database that has its tables already unless `fresh`.
    """
    started = []
    (tmp_path / "pids").mkdir()

    def start(plan=None, server=prefect_server, torchrun=True, fresh=False):
        if server is None and not fresh:
            (tmp_path / "home/prefect").mkdir(parents=True)
            shutil.copy(prefect_database, tmp_path / "home/prefect/prefect.db")
        (tmp_path / "plan.json").write_text(json.dumps(plan or {}))
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "RLHF_"))},
            "RLHF_HOME": str(tmp_path / "home"),
            "STUB_PLAN": str(tmp_path / "plan.json"),
            "STUB_PIDS": str(tmp_path / "pids"),
            "PYTHONPATH": str(ROOT),
            **({"PREFECT_API_URL": server} if server else {}),
            **({} if torchrun else {"STUB_PLAIN": "1"}),
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.flows.rlhf_with_stub", "run", "--preset", "smoke"],
            env=environment, cwd=tmp_path, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        return process

    start.store = open_store(str(tmp_path / "home/store"))
    start.pids = tmp_path / "pids"
    yield start
    for process in started:
        for child in [*children(process), process]:
            child.kill()


def children(process):
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def wait_for_ranks(command, process):
    deadline = time.monotonic() + 120
    while len(list(command.pids.iterdir())) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return children(process)


def test_run_tells_what_it_does_and_where_everything_is(command):
    out, err = command(torchrun=False).communicate(timeout=200)
    assert err == ""
    for stage in ("model", "data-sft", "sft", "label", "reward", "ppo", "evaluate", "publish"):
        assert f"\n✓ {stage} " in out
    assert "Traceback" not in out
    assert "\n  watch     http://127.0.0.1:" in out
    tail = out[out.index("Done in") :]
    for line in ("model ", "report ", "curves ", "chat      rlhf chat smoke"):
        assert f"\n  {line}" in tail
    out, _ = command(torchrun=False).communicate(timeout=120)
    assert out.count("reused  ") == 9
    assert "9 of 9 stages reused" in out


def test_failure_is_one_message_and_exit_code_1(command):
    process = command({"sft": ["data"]})
    out, err = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "Traceback" not in out + err
    assert err.strip().startswith("Error: sft failed: stub ran into data\nFull log: ")
    assert Path(err.strip().rpartition("Full log: ")[2]).is_file()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_run_leaves_no_process_and_says_how_to_go_on(command, number, code):
    process = command({"sft": ["sleep"]})
    family = wait_for_ranks(command, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "Run the same command again to resume from the last checkpoint" in err
    assert "Traceback" not in out + err
    assert psutil.wait_procs(family, timeout=20)[1] == []
    [path] = command.store.list_records("runs/")
    assert command.store.read_record(path)["state"] == "cancelled"


def test_run_cancelled_on_the_servers_page_ends_as_cancelled(command, prefect_server):
    process = command({"sft": ["sleep"]})
    family = wait_for_ranks(command, process)
    with httpx.Client(base_url=prefect_server) as api:
        body = {
            "flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}, "name": {"any_": ["smoke"]}}
        }
        [run] = api.post("/flow_runs/filter", json=body).json()
        state = {"state": {"type": "CANCELLING"}}
        api.post(f"/flow_runs/{run['id']}/set_state", json=state).raise_for_status()
        out, err = process.communicate(timeout=120)
        assert api.get(f"/flow_runs/{run['id']}").json()["state_type"] == "CANCELLED"
        logs = api.post("/logs/filter", json={"logs": {"flow_run_id": {"any_": [run["id"]]}}}).text
    assert "stopped by a signal" in logs and "Crash detected" not in logs
    assert process.returncode == 143
    assert "Run the same command again to resume from the last checkpoint" in err
    assert "Traceback" not in out + err
    assert psutil.wait_procs(family, timeout=20)[1] == []


def test_temporary_server_ends_with_the_run(command):
    process = command({"import_model": ["data"]}, server=None, torchrun=False, fresh=True)
    family = []
    while process.poll() is None:
        family = children(process) or family
        time.sleep(0.5)
    out, _ = process.communicate()
    assert "a temporary server (PREFECT_API_URL is not set)" in out
    assert family
    assert psutil.wait_procs(family, timeout=20)[1] == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_to_the_whole_group_ends_the_run_and_then_its_server(command, number, code):
    """Ctrl-C at a terminal, and a service manager's or `timeout`'s stop."""
    process = command({"sft": ["sleep"]}, server=None)
    family = wait_for_ranks(command, process)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "Run the same command again to resume from the last checkpoint" in err
    assert "Traceback" not in err
    assert psutil.wait_procs(family, timeout=20)[1] == []
    [path] = command.store.list_records("runs/")
    assert command.store.read_record(path)["state"] == "cancelled"


def test_killed_run_leaves_no_process(command):
    process = command({"sft": ["sleep"]}, server=None)
    family = wait_for_ranks(command, process)
    assert any("flows.api_server" in " ".join(child.cmdline()) for child in family)
    process.kill()
    assert psutil.wait_procs(family, timeout=20)[1] == []
