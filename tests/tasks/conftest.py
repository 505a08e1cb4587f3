"""Real processes, with rlhf_stub in the place of the ranks' code."""

from pathlib import Path

import pytest

import tasks.launchers.local as local
from rlhf_core.store import open_store

STUBS = Path(__file__).parent / "stubs"


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """Makes the launcher run rlhf_stub; returns a function that sets its plan."""
    import json

    plan, pids = tmp_path / "plan.json", tmp_path / "pids"
    pids.mkdir()
    plan.write_text("{}")
    monkeypatch.setattr(local, "MODULE", "rlhf_stub.__main__")
    monkeypatch.setenv("PYTHONPATH", str(STUBS))
    monkeypatch.setenv("STUB_PLAN", str(plan))
    monkeypatch.setenv("STUB_PIDS", str(pids))
    monkeypatch.setenv("RLHF_HOME", str(tmp_path / "home"))

    def set_plan(**behaviours):
        plan.write_text(json.dumps(behaviours))
        return pids

    return set_plan


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "store"))
