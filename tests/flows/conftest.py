"""The stand-in for the ranks, and the command line. The Prefect server is in tests/conftest.py."""

import json
import os
from dataclasses import asdict

import psutil
import pytest

from flows.cli.system import Options, System
from tests import forked
from tests.tasks.conftest import store, stub  # noqa: F401 (fixtures)


@pytest.fixture(scope="session")
def prefect_database(prefect_server, shared_folder):
    """A database with all tables, for servers that a test starts."""
    return shared_folder / "prefect.db"


@pytest.fixture
def rlhf(tmp_path, monkeypatch):
    """Runs the real command in a folder of its own; returns the finished process."""
    for name in ("PREFECT_API_URL", "RLHF_STORE", "PREFECT_HOME", "PREFECT_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "my home"  # with a space
    home.mkdir()

    def run(*arguments, code=None, env=None):
        process = forked.run(
            "-m", "flows.cli.main", *map(str, arguments), cwd=home,
            env={**os.environ, "RLHF_HOME": str(home / ".rlhf"), **(env or {})},
        )  # fmt: skip
        if code is not None:
            assert process.returncode == code, process.stdout + process.stderr
        return process

    run.home = home
    return run


@pytest.fixture
def running(rlhf):
    """A system whose supervisor is this process."""
    folder = rlhf.home / ".rlhf/system"
    folder.mkdir(parents=True)
    started = psutil.Process().create_time()
    system = System(os.getpid(), started, "ready", "http://127.0.0.1:9", "s3://rlhf/store",
                    environment={"PREFECT_API_URL": "http://127.0.0.1:9/api"},
                    options=asdict(Options(port=9, s3_port=None, slots=1)))  # fmt: skip
    (folder / "system.json").write_text(json.dumps(asdict(system)))
