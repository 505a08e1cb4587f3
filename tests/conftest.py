"""For all tests: their order, and a real Prefect server."""

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

# A shell without job control starts what runs in its background with SIGINT ignored, and children
# inherit that: the tests that press Ctrl-C would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# The longest files, in the order in which `make test` hands them out: those that mostly wait, for
# servers and time limits, beside those whose ranks keep both cores busy.
LONGEST = (
    "flows/test_smoke.py", "store/s3/test_failures.py", "store/test_time_limits.py",
    "store/test_collect.py", "store/test_races.py", "flows/cli/test_run.py",
    "flows/test_flow.py", "tests/test_tutorial.py", "flows/test_stage_lists.py",
    "algorithms/test_online.py", "faults/test_store_away.py", "faults/test_resume.py",
    "algorithms/test_stages.py", "faults/test_stopping.py", "algorithms/test_preference.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Long files first, then those with other slow tests: none is left to one worker at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}

    def rank(item: Any) -> int:
        path = item.path.as_posix()
        place = [i for i, name in enumerate(LONGEST) if path.endswith(name)]
        return place[0] if place else len(LONGEST) + (item.path not in slow)

    items.sort(key=rank)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """A folder that all worker processes of this test session have in common."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def once(shared_folder):
    """Makes what several worker processes need, in one of them: `once(name, make)`.

    Returns a folder, not to be changed, and what `make(folder)` returned, which is kept as JSON.
    """

    def made(name: str, make: Callable[[Path], Any]) -> tuple[Path, Any]:
        folder = shared_folder / name
        value = folder / "made.json"
        with FileLock(f"{folder}.lock"):
            if not value.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                partial = value.with_suffix(".part")
                partial.write_text(json.dumps(make(folder)))
                partial.rename(value)
        return folder, json.loads(value.read_text())

    return made


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
            stack.enter_context(prefect_test_harness(server_startup_timeout=600))
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
