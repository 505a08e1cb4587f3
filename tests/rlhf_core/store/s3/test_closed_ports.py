"""What somebody without keys gets at the ports of the local S3 server: nothing to read or write."""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import stat
from itertools import product

import boto3
import psutil
import pytest

from rlhf_core.errors import ConfigError
from rlhf_core.store.s3.seaweed_keys import access_keys
from tests.rlhf_core.store.seaweed import BUCKET

# They tell that a server runs, and hold nothing of the store.
STATUS_PAGES = {
    ("master", "/"), ("master", "/ui/index.html"), ("master", "/cluster/status"),
    ("master", "/healthz"), ("volume", "/status"), ("volume", "/healthz"), ("s3", "/status"),
    ("s3", "/healthz"), ("admin", "/metrics"),
}  # fmt: skip
PATHS = (
    "/", "/ui/index.html", "/cluster/status", "/status", "/healthz", "/metrics", "/dir/assign",
    "/dir/lookup?volumeId=1", "/dir/status", "/vol/grow?count=1", "/submit", "/buckets/",
    f"/buckets/{BUCKET}/", f"/buckets/{BUCKET}/secret.txt", f"/{BUCKET}/", f"/{BUCKET}/secret.txt",
    "/1,0123456789", "/.tus/x", "/debug/pprof/",
)  # fmt: skip


@pytest.fixture(scope="module")
def client(seaweed):
    found = boto3.client(
        "s3", endpoint_url=seaweed.endpoint, region_name="us-east-1",
        aws_access_key_id=seaweed.keys["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=seaweed.keys["AWS_SECRET_ACCESS_KEY"],
    )  # fmt: skip
    found.put_object(Bucket=BUCKET, Key="secret.txt", Body=b"confidential" * 100)
    return found


def ports(server):
    """Name -> port, of the command line."""
    options = (argument.lstrip("-").split("=") for argument in server.command if "=" in argument)
    return {name: int(value) for name, value in options if ".port" in name and value != "0"}


def test_server_listens_on_the_ports_of_its_command_and_on_this_machine_only(seaweed):
    process = psutil.Process(seaweed._process.pid)
    found = [c.laddr for c in process.net_connections() if c.status == "LISTEN"]
    assert {address.ip for address in found} == {"127.0.0.1"}
    assert {address.port for address in found} <= set(ports(seaweed).values())


def test_http_without_keys_is_refused_on_every_port(seaweed, client):
    answered = set()
    for (name, port), path, method in product(
        ports(seaweed).items(), PATHS, ("GET", "PUT", "POST", "DELETE")
    ):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            connection.request(method, path, body=b"x" if method in ("PUT", "POST") else None)
            reply = connection.getresponse()
            text = reply.read()
        except (http.client.HTTPException, ConnectionError):
            assert name.endswith(".grpc")
            continue
        finally:
            connection.close()
        assert b"confidential" not in text, (name, path)
        if reply.status not in (400, 401, 403, 404, 405):
            answered.add((name.removesuffix(".port"), path))
    assert answered <= STATUS_PAGES
    assert client.get_object(Bucket=BUCKET, Key="secret.txt")["ContentLength"] == 1200
    assert [
        o["Key"] for o in client.list_objects_v2(Bucket=BUCKET, Prefix="secret")["Contents"]
    ] == ["secret.txt"]


@pytest.mark.parametrize("part", ["s3", "master", "filer", "volume", "admin"])
def test_grpc_wants_the_certificate(seaweed, part):
    """TLS 1.3 refuses a client after its own handshake, so at the first byte that it reads."""
    hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"

    def ask(context):
        context.set_alpn_protocols(["h2"])
        address = ("127.0.0.1", ports(seaweed)[f"{part}.port.grpc"])
        with socket.create_connection(address, 10) as raw, context.wrap_socket(raw) as secured:
            secured.sendall(hello)
            return secured.recv(100)

    with pytest.raises((ssl.SSLError, ConnectionError)):
        ask(ssl._create_unverified_context())
    known = ssl._create_unverified_context()
    known.load_cert_chain(seaweed.folder / "grpc.pem")
    assert ask(known)


def test_keys_are_private_and_written_whole(seaweed, tmp_path, monkeypatch):
    assert stat.S_IMODE(seaweed.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((seaweed.folder / "grpc.pem").stat().st_mode) == 0o600
    path = tmp_path / "keys.json"

    def full(number):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "fsync", full)
        access_keys(path)
    assert list(tmp_path.iterdir()) == [], "neither half a file nor its remains"
    path.write_text('{"AWS_ACCESS_KEY_ID": ')
    with pytest.raises(ConfigError, match=r"keys\.json is damaged.*Delete it"):
        access_keys(path)
    path.unlink()
    assert access_keys(path) == access_keys(path) == json.loads(path.read_text())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
