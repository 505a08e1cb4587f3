import pytest

from rlhf_core.store import open_store


@pytest.fixture
def store(tmp_path, monkeypatch):
    """The store that commands use by default, and no server."""
    monkeypatch.setenv("RLHF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RLHF_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    return open_store()
