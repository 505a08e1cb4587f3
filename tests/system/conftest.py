"""One whole system, `rlhf up`, for all tests of this folder: servers, workers, deployments.

Stages run for real, unless a test writes a plan for the stand-in (tests/tasks/stubs).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from rlhf_core.system.ports import free_ports

ROOT = Path(__file__).parents[2]
STUBS = ROOT / "tests/tasks/stubs"
PATIENCE = float(os.environ.get("PATIENCE", "1"))  # on a machine that others use too
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "CRASHED"}


class System:
    """A running system in a folder of its own; `api` is its REST interface."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_ports(1)[0]
        self.plan_file = folder / "plan.json"
        self.pids = folder / "pids"
        self.pids.mkdir()
        self.numbers = itertools.count()
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "RLHF_"))}
        self.environment = {
            **clean,
            "RLHF_HOME": str(folder / "home"),
            "STUB_PLAN": str(self.plan_file),
            "STUB_PIDS": str(self.pids),
            "PYTHONPATH": os.pathsep.join(map(str, [ROOT / "tests/system/site", STUBS, ROOT])),
        }
        self.url = f"http://127.0.0.1:{self.port}"
        self.api = httpx.Client(base_url=f"{self.url}/api", timeout=60)

    def up(self, slots: int = 2) -> str:
        port = str(self.port)
        return self.rlhf("up", "--port", port, "--s3-port", "0", "--slots", str(slots))

    def rlhf(self, *arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "flows.cli.main", *arguments], cwd=self.folder,
            env=self.environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout if code == 0 else done.stderr

    def log_in(self) -> str:
        """USER:PASSWORD of the API, which `api` sends from now on."""
        login = (self.folder / "home/system/login").read_text().strip()
        user, _, password = login.partition(":")
        self.api.auth = (user, password)
        return login

    def plan(self, **behaviours: list[str]) -> None:
        """Stages of runs that start from now on are stand-ins."""
        for path in self.pids.iterdir():
            path.unlink()
        self.plan_file.write_text(json.dumps(behaviours))

    def for_real(self) -> None:
        self.plan_file.unlink(missing_ok=True)

    # ------------------------------------------------------------------ the server

    def get(self, path: str) -> Any:
        return self.ask("GET", path)

    def post(self, path: str, body: dict[str, Any] | list[Any] | None = None) -> Any:
        return self.ask("POST", path, body or {})

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """An answer of the server, which says 503 while its database is busy."""
        for _ in range(10):
            answer = self.api.request(method, path, json=body)
            if answer.status_code != 503:
                break
            time.sleep(1)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def submit(self, *overrides: str, preset: str = "smoke") -> str:
        """Start a pipeline. It publishes under a name of its own: the champion that another test
        has made would be one more stage, and a stand-in's cannot be loaded."""
        if not any(override.startswith("publish.name=") for override in overrides):
            overrides = (*overrides, f"publish.name=test-{next(self.numbers)}")
        sets = [part for override in overrides for part in ("--set", override)]
        return self.rlhf("submit", "--preset", preset, *sets).strip().rpartition("/")[2]

    def run(self, run: str) -> dict[str, Any]:
        found: dict[str, Any] = self.get(f"/flow_runs/{run}")
        return found

    def wait(self, run: str, *states: str, seconds: float = 240) -> dict[str, Any]:
        """Until the run's state type is one of `states` (any final one by default)."""
        deadline = time.monotonic() + seconds * PATIENCE
        while True:
            found = self.run(run)
            if found["state_type"] in (states or FINAL):
                return found
            if found["state_type"] in FINAL or time.monotonic() > deadline:
                raise AssertionError(f"{found['state']}\n" + "\n".join(self.logs(run)[-40:]))
            time.sleep(0.5)

    def logs(self, run: str) -> list[str]:
        body = {"logs": {"flow_run_id": {"any_": [run]}}, "sort": "TIMESTAMP_ASC", "limit": 200}
        lines = []
        while page := self.post("/logs/filter", {**body, "offset": len(lines)}):
            lines += [line["message"] for line in page]
        return lines

    def tasks(self, run: str) -> dict[str, dict[str, Any]]:
        """Name of each task of a run -> its newest task run."""
        body = {"flow_runs": {"id": {"any_": [run]}}, "sort": "EXPECTED_START_TIME_ASC"}
        return {t["name"]: t for t in self.post("/task_runs/filter", body)}

    def children(self, run: str | None = None, stage: str | None = None) -> list[dict[str, Any]]:
        """Flow runs of the gpu pool, oldest first."""
        tags = [f"parent:{run}"] if run else []
        tags += [f"stage:{stage}"] if stage else []
        body = {
            "flow_runs": {"tags": {"all_": tags}} if tags else {},
            "flows": {"name": {"any_": ["rlhf-job"]}},
            "sort": "START_TIME_ASC", "limit": 200,
        }  # fmt: skip
        found: list[dict[str, Any]] = []
        while page := self.post("/flow_runs/filter", {**body, "offset": len(found)}):
            found += page
        return found

    # ------------------------------------------------------------------ processes

    def processes(self, *words: str) -> list[psutil.Process]:
        """Processes of this system whose command line has all the words."""
        found = []
        for process in psutil.process_iter():
            try:
                line = " ".join(process.cmdline())
                home = process.environ().get("RLHF_HOME")
            except psutil.Error:
                continue
            ours = home == self.environment["RLHF_HOME"]
            if ours and process.pid != os.getpid() and all(word in line for word in words):
                found.append(process)
        return found

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The supervisor sleeps: what is killed meanwhile stays away."""
        [supervisor] = self.processes("flows.cli.supervisor")
        supervisor.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            supervisor.send_signal(signal.SIGCONT)

    def stand_ins(self) -> list[psutil.Process]:
        """Stages' processes that wait."""
        return [psutil.Process(int(path.name)) for path in self.pids.iterdir()]

    def ranks(self) -> list[psutil.Process]:
        """Forked ones have the fork server's command line, and a name of their own."""
        found = self.processes("rlhf_core.runtime.fork_server")
        return [p for p in found if p.is_running() and p.name().startswith("rlhf rank")]


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/system" in item.path.as_posix() and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(600 * PATIENCE))


@pytest.fixture(scope="session")
def system(tmp_path_factory):
    found = System(tmp_path_factory.mktemp("a system"))
    found.up()
    found.log_in()
    yield found
    found.rlhf("down")
    assert found.processes() == []


@pytest.fixture
def stand_ins(system):
    """Every stage is a stand-in that succeeds, unless the test plans something else."""
    system.plan()
    yield
    system.plan()


def until(condition, seconds: float, what: str = "it"):
    """The first true answer of `condition`."""
    deadline = time.monotonic() + seconds * PATIENCE
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"{what} did not come within {seconds} s"
        time.sleep(0.3)
    return answer


def kill_with_family(process):
    family = [process, *process.children(recursive=True)]
    for each in family:
        each.kill()
    psutil.wait_procs(family, timeout=10)
