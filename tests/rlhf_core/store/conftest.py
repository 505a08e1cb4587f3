"""Stores on a folder and on a real S3 server, through the same fixture."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_core.store import Store, open_store
from tests.rlhf_core.store.clouds.azure import CONTAINER, Azurite
from tests.rlhf_core.store.clouds.google import GoogleProxy
from tests.rlhf_core.store.seaweed import ACCESS_KEY, BUCKET, SECRET_KEY, SeaweedServer


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedServer]:
    server = SeaweedServer(tmp_path_factory.mktemp("seaweed"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def google(seaweed: SeaweedServer) -> Iterator[GoogleProxy]:
    server = GoogleProxy(seaweed)
    yield server
    server.kill()


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    server = Azurite(tmp_path_factory.mktemp("azurite"))
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home of its own, no settings and no keys but the test's."""
    import os

    for name in list(os.environ):
        if name.startswith(("RLHF_", "AWS_", "AZURE_", "GOOGLE_")) and name != "RLHF_TEST_AZURITE":
            monkeypatch.delenv(name)
    monkeypatch.setenv("RLHF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-aws-credentials"))


@pytest.fixture(autouse=True)
def no_children_left() -> Iterator[None]:
    """Processes that a failed test has left behind."""
    import multiprocessing

    yield
    for child in multiprocessing.active_children():
        child.kill()
        child.join()


@pytest.fixture
def s3_url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh prefix on the S3 server, whose endpoint is set in the environment."""
    server: SeaweedServer = request.getfixturevalue("seaweed")
    monkeypatch.setenv("RLHF_STORE_ENDPOINT", server.endpoint)
    return f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}"


@pytest.fixture
def gs_url(google: GoogleProxy, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh prefix on the server that speaks Google's API."""
    for name, value in google.environment.items():
        monkeypatch.setenv(name, value)
    return f"gs://{BUCKET}/{uuid.uuid4().hex[:12]}"


@pytest.fixture
def az_url(azurite: Azurite, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh prefix on Azurite."""
    for name, value in azurite.environment.items():
        monkeypatch.setenv(name, value)
    return f"az://{CONTAINER}/{uuid.uuid4().hex[:12]}"


@pytest.fixture(
    params=["file", "s3", *(pytest.param(name, marks=pytest.mark.clouds) for name in ("gs", "az"))]
)
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file://{tmp_path / 'store'}"
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
def store(store_url: str) -> Store:
    return open_store(store_url)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small folder to publish: two files, one of them in a folder, one empty."""
    made = tmp_path / "folder"
    (made / "weights").mkdir(parents=True)
    (made / "config.json").write_text('{"hidden_size": 8}')
    (made / "weights" / "model.bin").write_bytes(bytes(range(256)) * 40)
    (made / "empty").write_bytes(b"")
    return made
