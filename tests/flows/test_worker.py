"""A worker as docker/compose.yaml starts it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rlhf_core.system.ports import free_ports

COMPOSE = Path(__file__).parents[2] / "docker/compose.yaml"


@pytest.mark.slow
def test_health_check_of_a_worker_answers(prefect_server: str, tmp_path: Path) -> None:
    """The compose file's own test, with another port in its place."""
    control = yaml.safe_load(COMPOSE.read_text())["services"]["control"]
    [port] = free_ports(1)
    environment = {
        **os.environ, "PREFECT_API_URL": prefect_server, "PREFECT_HOME": str(tmp_path),
        "PREFECT_WORKER_WEBSERVER_PORT": str(port), "PREFECT_WORKER_WEBSERVER_HOST": "127.0.0.1",
    }  # fmt: skip
    program = [sys.executable, "-m", *control["command"]]
    check = [part.replace("8080", str(port)) for part in control["healthcheck"]["test"][1:]]
    check[0] = sys.executable

    def healthy() -> bool:
        return subprocess.run(check, capture_output=True, timeout=30, check=False).returncode == 0

    assert not healthy()
    with (tmp_path / "log").open("wb") as log:
        worker = subprocess.Popen(program, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while not healthy():
            assert worker.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.3)
    finally:
        worker.terminate()
        worker.wait(30)
