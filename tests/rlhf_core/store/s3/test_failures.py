"""What goes wrong between a machine and an S3 server, with a real server behind it."""

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_core.errors import StoreUnavailable
from rlhf_core.store import Store, StoreSettings, open_store
from rlhf_core.system.ports import free_ports
from tests.rlhf_core.store.helpers import contents
from tests.rlhf_core.store.proxy import Proxy
from tests.rlhf_core.store.seaweed import BUCKET, SECRET_KEY, SeaweedServer

IMPATIENT = StoreSettings(retries=0, connect_timeout=1, read_timeout=0.5)


def refusal(store: Store, seconds: float) -> str:
    """The message of StoreUnavailable that both the preflight and a plain call end with."""
    messages = []
    for call in (store.check, lambda: store.write_record("runs/a.json", {}), lambda: store.list()):
        began = time.monotonic()
        with pytest.raises(StoreUnavailable) as caught:
            call()
        assert time.monotonic() - began < seconds
        messages.append(str(caught.value))
        assert SECRET_KEY not in messages[-1]
    return "\n".join(messages)


def test_server_that_is_down_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = f"http://127.0.0.1:{free_ports(1)[0]}"
    monkeypatch.setenv("RLHF_STORE_ENDPOINT", endpoint)
    monkeypatch.setenv("RLHF_STORE_RETRIES", "0")
    message = refusal(open_store("s3://artifacts/x"), 10)
    assert message.count(endpoint) == 3 and message.count("RLHF_STORE_ENDPOINT") == 3
    assert message.count("cannot be reached") == 3


def test_host_without_a_name_is_reported() -> None:
    settings = StoreSettings(endpoint="http://no-such-host.invalid:9000", retries=0)
    assert "no-such-host.invalid" in refusal(open_store("s3://artifacts", settings), 15)


@pytest.mark.slow
def test_server_that_never_answers_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        store = open_store("s3://artifacts", IMPATIENT.model_copy(update={"endpoint": endpoint}))
        message = refusal(store, 30)
        assert message.count(endpoint) == 3 and "did not answer in time" in message


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_wrong_key_is_reported(s3_url: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "wrong-and-not-to-be-shown")
    message = refusal(open_store(s3_url), 10)
    assert message.count("AWS_SECRET_ACCESS_KEY") == 3 and message.count("refused") == 3
    assert message.count(os.environ["RLHF_STORE_ENDPOINT"]) == 3
    assert "wrong-and-not-to-be-shown" not in message


def test_missing_keys_are_reported(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert "no AWS credentials" in refusal(open_store(s3_url), 10)
    settings = StoreSettings(profile="nobody")
    assert "RLHF_STORE_PROFILE" in refusal(open_store(s3_url, settings), 10)


def test_missing_bucket_is_reported(s3_url: str) -> None:
    message = refusal(open_store("s3://not-there/x"), 10)
    assert message.count("there is no bucket 'not-there' at http://127.0.0.1") == 3


def test_endpoint_is_shown_without_its_password() -> None:
    settings = StoreSettings(endpoint="http://me:hidden@127.0.0.1:1/s3")
    assert settings.endpoint_name() == "http://127.0.0.1:1/s3"


@pytest.fixture
def proxy(seaweed: SeaweedServer) -> Iterator[Proxy]:
    made = Proxy(int(seaweed.endpoint.rpartition(":")[2]))
    yield made
    made.close()


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """One file of three parts."""
    made = tmp_path / "big"
    made.mkdir()
    (made / "weights.bin").write_bytes(os.urandom(40 * 2**20 + 7))
    return made


def test_checkpoint_that_shares_files_sends_only_the_new_ones(
    s3_url: str, proxy: Proxy, big: Path
) -> None:
    """Counted on the wire: bytes of all requests."""
    store = open_store(s3_url, StoreSettings(endpoint=proxy.endpoint))
    sent = 0

    def count(connection: int, offset: int, data: bytes) -> bytes:
        nonlocal sent
        sent += len(data)
        return data

    proxy.edit_request = count
    (big / "optimizer.bin").write_bytes(os.urandom(2**20))
    first = store.publish(big, kind="checkpoint", metadata={"step": 1})
    size = first.file("weights.bin").size
    assert first.size < sent < first.size + 100_000

    sent = 0
    (big / "optimizer.bin").write_bytes(os.urandom(2**20))
    second = store.publish(big, kind="checkpoint", metadata={"step": 2})
    assert 2**20 < sent < 2**20 + 100_000 < size
    sent = 0
    assert store.publish(big, kind="checkpoint", metadata={"step": 2}) == second
    assert sent < 100_000
    assert store.verify(second.digest) == []


def test_file_of_several_parts_survives_cut_connections(
    s3_url: str, proxy: Proxy, big: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(s3_url, StoreSettings(endpoint=proxy.endpoint))
    cut: set[int] = set()

    def cut_once_each(connection: int, offset: int, data: bytes) -> bytes | None:
        if offset > 2**20 and len(cut) < 3 and connection not in cut:
            cut.add(connection)
            return None
        return data

    proxy.edit_request = cut_once_each
    artifact = store.publish(big, kind="model")
    assert len(cut) == 3

    cut.clear()
    proxy.edit_request, proxy.edit = proxy.edit, cut_once_each
    assert contents(store.fetch(artifact.digest)) == contents(big)
    assert len(cut) == 3
    assert "try 2 of 7" in caplog.text
    assert store.verify(artifact.digest) == []


def test_bits_flipped_on_the_way_are_noticed_and_healed(
    s3_url: str, proxy: Proxy, big: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(s3_url, StoreSettings(endpoint=proxy.endpoint))
    flipped = threading.Event()

    def flip_one(connection: int, offset: int, data: bytes) -> bytes:
        if offset > 2**20 and not flipped.is_set():
            flipped.set()
            return data[:-1] + bytes([data[-1] ^ 1])
        return data

    proxy.edit_request = flip_one
    artifact = store.publish(big, kind="model")
    assert flipped.is_set()
    assert store.verify(artifact.digest) == []

    flipped.clear()
    proxy.edit_request, proxy.edit = lambda _c, _o, data: data, flip_one
    assert contents(store.fetch(artifact.digest)) == contents(big)
    assert flipped.is_set()


@pytest.mark.slow
def test_upload_that_stalls_is_given_up_and_repeated(
    s3_url: str, proxy: Proxy, big: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_core.store.s3.parts.SLOWEST", 16 * 2**20)
    settings = StoreSettings(endpoint=proxy.endpoint, connect_timeout=1, read_timeout=3)
    store = open_store(s3_url, settings)
    stalled = threading.Event()

    def stall_once(connection: int, offset: int, data: bytes) -> bytes:
        if offset > 2**20 and not stalled.is_set():
            stalled.set()
            time.sleep(10)
        return data

    proxy.edit_request = stall_once
    artifact = store.publish(big, kind="model")
    assert stalled.is_set()
    assert store.verify(artifact.digest) == []


@pytest.mark.slow
def test_server_restart_is_ridden_out(
    tmp_path: Path, big: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    server = SeaweedServer(tmp_path / "server")
    restart = threading.Timer(1.0, server.start)
    server.start()
    try:
        store = open_store(f"s3://{BUCKET}/x", StoreSettings(endpoint=server.endpoint))
        first = store.publish(big, kind="model", metadata={"n": 1})
        server.kill()
        restart.start()
        second = store.publish(big, kind="model", metadata={"n": 2})
        restart.join()
        assert "failed" in caplog.text
        assert store.list() == [second, first]
        assert contents(store.fetch(first.digest)) == contents(big)
    finally:
        # A server that starts after the kill would outlive the tests.
        if restart.ident is not None:
            restart.join()
        server.kill()


def test_abandoned_uploads_are_swept_by_age(s3_url: str) -> None:
    store = open_store(s3_url)
    client = store._backend.client  # type: ignore[attr-defined]
    key = s3_url.removeprefix(f"s3://{BUCKET}/") + "/blobs/sha256/ab/abcd"
    client.request("create_multipart_upload", "starting", Key=key)
    assert store.sweep() == 0
    assert open_store(s3_url + "-other").sweep(older_than=-5) == 0
    assert store.sweep(older_than=-5) == 1
    assert store.sweep(older_than=-5) == 0


def test_importing_the_store_and_using_a_folder_needs_no_s3_library(tmp_path: Path) -> None:
    code = (
        "import sys; from rlhf_core.store import open_store; "
        f"open_store({str(tmp_path / 's')!r}).check(); "
        "heavy = {'s3fs', 'fsspec', 'botocore', 'aiohttp', 'torch', 'prefect', 'transformers'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
