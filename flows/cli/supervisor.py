"""The process behind `rlhf up`: it starts a system's servers and workers, one after another, and
restarts one that exits. `python -m flows.cli.supervisor OPTIONS`, with `Options` as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from flows import api_server
from flows.cli.log_files import open_log, rotate
from flows.cli.system import START_SECONDS, Options, System, folder, login_file
from flows.server import QUIET, unreachable
from rlhf_core.errors import StoreUnavailable
from rlhf_core.store import rlhf_home
from rlhf_core.store.s3.seaweed import Seaweed
from rlhf_core.store.s3.synced import keep_synced
from rlhf_core.system.private import write_private

if TYPE_CHECKING:
    from tasks.launchers.processes import ProcessTree

# Work pools, each with one worker -> seconds between its queries, each of which writes to the
# server's database. A pipeline has many stages, and waits for each to start.
POOLS = {"control": 3, "gpu": 1}


class Supervisor:
    """Starts the system's processes one after another, and restarts one that exits."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.services: dict[str, tuple[list[str], dict[str, str], ProcessTree]] = {}
        me = psutil.Process()
        self.system = System(pid=me.pid, started=me.create_time(), options=asdict(options))

    def run(self) -> None:
        signal.signal(signal.SIGTERM, _stop)
        signal.signal(signal.SIGINT, _stop)
        try:
            self._write()
            self._start_all()
            self.system.phase = "ready"
            self._write()
            while True:
                time.sleep(2)
                self._restart_ended()
                with contextlib.suppress(OSError):  # a full disk
                    rotate(folder())
        except Exception as error:
            self.system.phase, self.system.error = "failed", f"{error}"
            self._write()
            raise
        finally:
            for name in ("gpu", "control", "server", "s3"):  # clients before servers
                if name in self.services:
                    self.services[name][2].terminate(15)

    def _start_all(self) -> None:
        home = folder()
        login = api_server.kept_login(login_file())
        environment = {
            **QUIET,
            api_server.LOGIN: login,
            "PREFECT_HOME": str(home / "prefect"),
            "PREFECT_API_URL": f"http://127.0.0.1:{self.options.port}/api",
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": (
                "prefect.server.concurrency.lease_storage.filesystem"
            ),
            # A worker replays events that it missed; an old cancellation would cancel the retry.
            "PREFECT_SERVER_EVENTS_MAXIMUM_WEBSOCKET_BACKFILL": "PT2S",
            # It would cancel the child of a cancelled pipeline, which others may be waiting for. A
            # child watches its pipeline itself.
            "PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_ENABLED": "false",
            # A run may wait long for a slot. By default one is late after 15 s, and the server
            # looks every 5 s, without a turn to write: on a busy SQLite most attempts fail.
            "PREFECT_SERVER_SERVICES_LATE_RUNS_AFTER_SECONDS": "600",
            "PREFECT_SERVER_SERVICES_LATE_RUNS_LOOP_SECONDS": "60",
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
            "PREFECT_LOGGING_SERVER_LEVEL": "WARNING",
            "RLHF_HOME": str(rlhf_home()),
        }
        store = {"RLHF_STORE": f"file://{rlhf_home() / 'store'}"}
        if self.options.s3_port is not None:
            store = self._start_s3(home / "s3")
        self._start(
            "server",
            api_server.command(self.options.host, self.options.port),
            {**environment, **api_server.environment(login, self.options.port)},
        )
        self._wait("server", lambda: unreachable(environment["PREFECT_API_URL"], 2.0))
        full = {**environment, **store}
        deploy = [sys.executable, "-m", "flows.deploy", str(self.options.slots)]
        self._run_to_end("deployments", deploy, full)
        self._recover(*POOLS, environment=full)
        for pool, query in POOLS.items():
            self._start(
                pool,
                [sys.executable, "-m", "flows.warm.worker", "start", "--pool", pool,
                 "--name", f"{pool}-1"],
                {**full, "PREFECT_WORKER_QUERY_SECONDS": str(query)},
            )  # fmt: skip
        self.system.ui = f"http://127.0.0.1:{self.options.port}"
        self.system.store = store["RLHF_STORE"]
        shared = ("PREFECT_API_URL", api_server.LOGIN, "PREFECT_FLOWS_HEARTBEAT_FREQUENCY")
        self.system.environment = {**{name: environment[name] for name in shared}, **store}

    def _start_s3(self, data: Path) -> dict[str, str]:
        """Start a SeaweedFS server with new keys; returns the environment of its clients."""
        server = Seaweed(data, self.options.s3_port or 0)
        self._start("s3", server.command, server.environment)
        self._wait("s3", server.problem)
        return server.client_environment

    def _start(self, name: str, command: list[str], environment: Mapping[str, str]) -> None:
        from rlhf_core.system.processes import die_with_parent
        from tasks.launchers.processes import ProcessTree

        with open_log(folder() / f"{name}.log") as log:
            process = subprocess.Popen(
                command, env={**os.environ, **environment}, cwd=folder(),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                preexec_fn=partial(die_with_parent, signal.SIGTERM),
            )  # fmt: skip
        self.services[name] = (command, dict(environment), ProcessTree(process))
        if name == "s3":
            keep_synced(folder() / "s3/data", process)

    def _recover(self, *pools: str, environment: Mapping[str, str]) -> None:
        """End the runs in progress that workers of these pools have left behind."""
        command = [sys.executable, "-m", "flows.recovery", *(f"{p}={p}-1" for p in pools)]
        self._run_to_end("recovery", command, environment)

    def _run_to_end(self, name: str, command: list[str], environment: Mapping[str, str]) -> None:
        done = subprocess.run(
            command, env={**os.environ, **environment}, cwd=folder(), capture_output=True,
            text=True, timeout=120,
        )  # fmt: skip
        write_private(folder() / f"{name}.log", done.stdout + done.stderr)
        if done.returncode != 0:
            raise StoreUnavailable(f"{name} failed; see {folder() / f'{name}.log'}")

    def _wait(self, name: str, problem: Any) -> None:
        deadline = time.monotonic() + START_SECONDS - 60
        found = ""
        while time.monotonic() < deadline:
            if self.services[name][2].process.poll() is not None:
                raise StoreUnavailable(f"{name} exited; see {folder() / f'{name}.log'}")
            found = problem()
            if not found:
                return
            time.sleep(0.3)
        raise StoreUnavailable(f"{name} is not ready: {found}; see {folder() / f'{name}.log'}")

    def _restart_ended(self) -> None:
        for name, (command, environment, tree) in list(self.services.items()):
            tree.refresh()
            if tree.process.poll() is None:
                continue
            if name in POOLS:
                if unreachable(environment["PREFECT_API_URL"], 2.0):
                    continue  # no use to it; and what it has left behind could not be ended
                with contextlib.suppress(StoreUnavailable, subprocess.TimeoutExpired):  # logged
                    self._recover(name, environment=environment)
            print(f"{name} exited with code {tree.process.returncode}; restarting it")
            self._start(name, command, environment)

    def _write(self) -> None:
        write_private(folder() / "system.json", json.dumps(asdict(self.system), indent=1))


def _stop(number: int, frame: object) -> None:
    raise SystemExit(0)


if __name__ == "__main__":
    Supervisor(Options(**json.loads(sys.argv[1]))).run()
