"""A real Prefect server for all flow tests, and the stand-in for the ranks."""

import contextlib
import os
import shutil
import sqlite3
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock

from tests import forked
from tests.tasks.conftest import store, stub  # noqa: F401 (fixtures)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """A folder that all worker processes of this test session have in common."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def prefect_server(shared_folder):
    """URL of a temporary server's API; flows in this process use it too."""
    from flows.server import QUIET

    os.environ.update(QUIET)
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    folder, made = Path(tempfile.mkdtemp()), shared_folder / "prefect.db"  # removed at exit
    with contextlib.ExitStack() as stack:
        # Migrations take longer than a start: the first server's database is the others' too.
        with FileLock(shared_folder / "prefect.lock"), pytest.MonkeyPatch.context() as patch:
            patch.setattr("prefect.testing.utilities.mkdtemp", lambda: str(folder))
            if made.exists():
                shutil.copy(made, folder / "prefect-test.db")
            stack.enter_context(prefect_test_harness(server_startup_timeout=180))
            if not made.exists():
                _copy_database(folder / "prefect-test.db", made)
        yield PREFECT_API_URL.value()


def _copy_database(source, target):
    """As it is now, while a server uses it."""
    partial = target.with_suffix(".part")
    with (
        contextlib.closing(sqlite3.connect(source)) as old,
        contextlib.closing(sqlite3.connect(partial)) as new,
    ):
        old.backup(new)
    partial.rename(target)


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
