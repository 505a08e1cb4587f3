"""A real Prefect server for all flow tests, and the stand-in for the ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tasks.conftest import store, stub  # noqa: F401 (fixtures)


@pytest.fixture(scope="session")
def prefect_server():
    """URL of a temporary server's API; flows in this process use it too."""
    from flows.server import QUIET

    os.environ.update(QUIET)
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=180):
        yield PREFECT_API_URL.value()


@pytest.fixture
def rlhf(tmp_path, monkeypatch):
    """Runs the real command in a folder of its own; returns the finished process."""
    for name in ("PREFECT_API_URL", "RLHF_STORE", "PREFECT_HOME", "PREFECT_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "my home"  # with a space
    home.mkdir()

    def run(*arguments, code=None, env=None):
        process = subprocess.run(
            [sys.executable, "-m", "flows.cli.main", *map(str, arguments)],
            cwd=home, capture_output=True, text=True, timeout=280,
            env={**os.environ, "RLHF_HOME": str(home / ".rlhf"), "PYTHONPATH": str(ROOT),
                 **(env or {})},
        )  # fmt: skip
        if code is not None:
            assert process.returncode == code, process.stdout + process.stderr
        return process

    run.home = home
    return run


ROOT = Path(__file__).parents[2]
