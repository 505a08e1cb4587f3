"""What the stores on gs:// and az:// say when something is wrong, and large files."""

from __future__ import annotations

import base64
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_core.errors import StoreUnavailable
from rlhf_core.store import Store, StoreSettings, open_store
from rlhf_core.store.clouds.client import PART
from rlhf_core.system.ports import free_ports
from tests.rlhf_core.store.clouds.azure import KEY
from tests.rlhf_core.store.clouds.google import TOKEN
from tests.rlhf_core.store.proxy import Proxy

HIDDEN = base64.b64encode(b"wrong, and not to be shown").decode()
ENDPOINT = {"gs": "GOOGLE_BASE_URL", "az": "AZURE_STORAGE_ENDPOINT"}
SECRET = {"gs": "GOOGLE_BEARER_TOKEN", "az": "AZURE_STORAGE_ACCOUNT_KEY"}
clouds = pytest.mark.parametrize("scheme", ["gs", "az"])


def refusal(store: Store, seconds: float) -> str:
    """What a check, a write and a list say, each within so many seconds."""
    messages = []
    for call in (store.check, lambda: store.write_record("runs/a.json", {}), lambda: store.list()):
        began = time.monotonic()
        with pytest.raises(StoreUnavailable) as caught:
            call()
        assert time.monotonic() - began < seconds
        messages.append(str(caught.value))
        shown = f"{caught.value} {caught.value.__cause__}"
        assert all(secret not in shown for secret in (HIDDEN, KEY, TOKEN)), shown
    return "\n".join(messages)


@clouds
def test_service_that_is_down_is_named(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = f"http://127.0.0.1:{free_ports(1)[0]}"
    monkeypatch.setenv(ENDPOINT[scheme], endpoint)
    monkeypatch.setenv(SECRET[scheme], HIDDEN)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "someone")
    message = refusal(open_store(f"{scheme}://artifacts/x", StoreSettings(retries=0)), 10)
    assert message.count(endpoint) == 3 and message.count(ENDPOINT[scheme]) == 3
    assert message.count("cannot be reached") == 3


def test_account_that_is_not_named_or_has_a_malformed_key_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert refusal(open_store("az://artifacts"), 5).count("AZURE_STORAGE_ACCOUNT_NAME") == 3
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "someone")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "no base64, and secret")
    assert "no base64" not in refusal(open_store("az://artifacts"), 5)


def test_library_is_imported_for_its_own_stores_only(tmp_path: Path) -> None:
    code = (
        "import sys; from rlhf_core.store import open_store; open_store('gs://bucket');"
        f"open_store({str(tmp_path)!r}).check(); assert 'obstore' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@clouds
@pytest.mark.clouds
def test_wrong_and_missing_credentials_and_a_missing_bucket_are_told_apart(
    scheme: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = request.getfixturevalue(f"{scheme}_url")
    missing = refusal(open_store(f"{scheme}://not-there/x"), 10)
    assert missing.count("there is no ") == 3 and missing.count("'not-there'") == 3
    monkeypatch.setenv(SECRET[scheme], HIDDEN)
    assert refusal(open_store(url), 10).count("refused") == 3
    monkeypatch.delenv(SECRET[scheme])
    # without any, obstore asks the machine for its identity
    message = refusal(open_store(url), 30)
    assert message.count("credentials of") == 3 and os.environ[ENDPOINT[scheme]] in message


@clouds
@pytest.mark.clouds
def test_service_that_never_answers_is_given_up(
    scheme: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = request.getfixturevalue(f"{scheme}_url")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv(ENDPOINT[scheme], f"http://127.0.0.1:{silent.getsockname()[1]}")
        store = open_store(url, StoreSettings(retries=0, connect_timeout=1, read_timeout=1))
        assert refusal(store, 10).count("did not answer in time") == 3
        began = time.monotonic()
        with pytest.raises(StoreUnavailable):
            open_store(url).check()
        assert time.monotonic() - began < 20


@clouds
@pytest.mark.clouds
def test_large_file_goes_in_parts_and_survives_cut_connections(
    scheme: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url = request.getfixturevalue(f"{scheme}_url")
    folder = tmp_path / "big"
    folder.mkdir()
    (folder / "weights.bin").write_bytes(os.urandom(3 * PART + 7))
    endpoint = os.environ[ENDPOINT[scheme]]
    proxy = Proxy(int(endpoint.rpartition(":")[2].partition("/")[0]))
    host, other = endpoint.split("/")[2], proxy.endpoint.split("/")[2]
    monkeypatch.setenv(ENDPOINT[scheme], endpoint.replace(host, other))
    try:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        store = open_store(url)
        artifact = store.publish(folder, kind="model")
        cut: set[int] = set()

        def edit(connection: int, offset: int, data: bytes) -> bytes | None:
            if offset > 2**20 and len(cut) < 2:  # twice, in the middle of a part
                cut.add(connection)
                return None
            return data

        proxy.edit = edit
        fetched = store.fetch(artifact.digest, tmp_path / "copy")
        assert len(cut) == 2
        assert (fetched / "weights.bin").read_bytes() == (folder / "weights.bin").read_bytes()
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 400 * 2**10  # KiB
    finally:
        proxy.close()
