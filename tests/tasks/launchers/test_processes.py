"""A process and its descendants, with real processes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from tasks.launchers.processes import ProcessTree

FAMILY = """
import subprocess, sys, time
child = "import subprocess, sys, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"
for _ in range(3):
    subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
time.sleep(60)
"""


@pytest.fixture
def tree() -> Iterator[ProcessTree]:
    """Three children in sessions of their own, and a child of each."""
    found = ProcessTree(subprocess.Popen([sys.executable, "-c", FAMILY]))
    deadline = time.monotonic() + 60
    while len(found.alive()) < 6 and time.monotonic() < deadline:
        time.sleep(0.1)
        found.refresh()
    yield found
    found.terminate(0.0)


def test_descendants_are_found_with_one_look_at_all_processes(
    tree: ProcessTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(tree.alive()) == 6
    looks, pids = [], psutil.pids

    def counted() -> list[int]:
        looks.append(1)
        return pids()

    monkeypatch.setattr(psutil, "pids", counted)
    tree.refresh()
    assert len(looks) == 1 and len(tree.alive()) == 6


def test_children_of_an_ended_descendant_are_not_forgotten(tree: ProcessTree) -> None:
    parents = [p for p in tree.alive() if p.name() != "sleep"]
    parents[0].kill()
    time.sleep(0.5)
    tree.refresh()
    assert len(tree.alive()) == 5


def test_all_end(tree: ProcessTree) -> None:
    family = tree.alive()
    tree.terminate(0.0)
    assert len(family) == 6 and not psutil.wait_procs(family, timeout=10)[1]
