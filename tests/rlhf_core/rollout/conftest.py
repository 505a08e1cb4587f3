"""Each test sees what the fast paths log, which a process says only once."""

import pytest

from rlhf_core.nn import fast_paths


@pytest.fixture(autouse=True)
def nothing_logged_yet(monkeypatch):
    monkeypatch.setattr(fast_paths, "_logged", set())
