"""What cannot work ends within half a minute, and says where and which setting."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_core.system.ports import free_ports
from tests.rlhf_core.store.seaweed import SECRET_KEY

ROOT = Path(__file__).parents[3]
LIMIT = 30.0
NO_DISK = "this user may not mount a disk of its own"

pytestmark = pytest.mark.slow


def begin(*arguments: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli.main", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_store_that_cannot_be_used_ends_every_command_in_time(s3_url: str) -> None:
    """With the default settings: nobody there, nobody who answers, wrong keys, no bucket."""
    endpoint = os.environ["RLHF_STORE_ENDPOINT"]
    refused = f"http://127.0.0.1:{free_ports(1)[0]}"
    with socket.create_server(("127.0.0.1", 0)) as server:
        silent = f"http://127.0.0.1:{server.getsockname()[1]}"
        cases = [
            (s3_url, {"RLHF_STORE_ENDPOINT": refused}, [refused, "RLHF_STORE_ENDPOINT"]),
            (s3_url, {"RLHF_STORE_ENDPOINT": silent}, [silent, "RLHF_STORE_ENDPOINT", "in time"]),
            (s3_url, {"AWS_SECRET_ACCESS_KEY": "wr0ng"}, [endpoint, "AWS_SECRET_ACCESS_KEY"]),
            ("s3://not-there/x", {}, [endpoint, "not-there", "RLHF_STORE"]),
        ]
        began = time.monotonic()
        running = [
            (begin("artifacts", "list", RLHF_STORE=url, **environment), words)
            for url, environment, words in cases
        ]
        for process, words in running:
            _, text = process.communicate(timeout=60)
            assert time.monotonic() - began < LIMIT
            assert process.returncode == 1 and "Traceback" not in text
            assert [word for word in words if word not in text] == [], text
            assert SECRET_KEY not in text and "wr0ng" not in text


FULL = """
import os, sys, time
from pathlib import Path
from rlhf_core.errors import StoreError
from rlhf_core.store import open_store

small, large = Path(sys.argv[1]), Path(sys.argv[2])
os.environ["RLHF_HOME"] = str(large / "home")
folder = large / "data"
folder.mkdir()
(folder / "weights").write_bytes(os.urandom(8_000_000))

def attempt(name, call):
    began = time.monotonic()
    try:
        call()
        print(name, "worked")
    except StoreError as error:
        print(name, f"{time.monotonic() - began:.0f}", error)

attempt("publish", lambda: open_store(str(small / "store")).publish(folder, kind="model"))
good = open_store(str(large / "store"))
digest = good.publish(folder, kind="model").digest
attempt("pull", lambda: good.fetch(digest, small / "copy"))
os.environ["RLHF_HOME"] = str(small / "home")
attempt("fetch", lambda: good.fetch(digest))
print("left", sorted(path.name for path in small.rglob("*") if path.stat().st_size > 100_000))
"""

FULL_SERVER = """
import logging, os, sys, time
from pathlib import Path
from rlhf_core.errors import StoreError
from rlhf_core.store import open_store
from rlhf_core.store.s3.seaweed import Seaweed

server = Seaweed(Path(sys.argv[1]))
server.start()
try:
    os.environ.update(server.client_environment)
    folder = Path(sys.argv[2]) / "data"
    folder.mkdir()
    (folder / "weights").write_bytes(os.urandom(80_000_000))
    began = time.monotonic()
    try:
        open_store().publish(folder, kind="model")
    except StoreError as error:
        print("publish", f"{time.monotonic() - began:.0f}", error)
    print("listed", len(open_store().list()), server.endpoint)
finally:
    server.kill()
"""


def on_a_small_disk(tmp_path: Path, megabytes: int, code: str) -> "subprocess.Popen[str]":
    """A script whose first argument is a disk of so many megabytes, its second a large one."""
    for name in ("small", "large"):
        (tmp_path / name).mkdir()
    mount = f'mount -t tmpfs -o size={megabytes}m tmpfs "$1" && exec "$0" -c "$3" "$1" "$2"'
    return subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", mount,
         sys.executable, str(tmp_path / "small"), str(tmp_path / "large"), code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def lines_of(script: "subprocess.Popen[str]") -> list[str]:
    out, err = script.communicate(timeout=120)
    assert script.returncode == 0, err
    return out.splitlines()


def may_mount(folder: Path) -> bool:
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(command, capture_output=True).returncode == 0


def test_full_disk_is_named_and_nothing_half_is_left(tmp_path: Path) -> None:
    if not may_mount(tmp_path):
        pytest.skip(NO_DISK)
    found = {line.split()[0]: line for line in lines_of(on_a_small_disk(tmp_path, 3, FULL))}
    assert found["left"] == "left ['reserve']"
    for name in ("publish", "pull", "fetch"):
        _, seconds, message = found[name].split(" ", 2)
        assert float(seconds) < LIMIT
        assert str(tmp_path / "small") in message and "RLHF_STORE or RLHF_HOME" in message
        assert "bytes" in message and "free" in message


def test_full_disk_of_the_server_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not may_mount(tmp_path):
        pytest.skip(NO_DISK)
    # SeaweedFS says no more than that something went wrong, so it is tried again as long as for any
    # other passing failure: some 25 seconds with the default of six.
    monkeypatch.setenv("RLHF_STORE_RETRIES", "3")
    message, listed = lines_of(on_a_small_disk(tmp_path, 60, FULL_SERVER))
    _, count, endpoint = listed.split()
    assert count == "0" and 5 < float(message.split()[1]) < LIMIT
    assert endpoint in message and "disk is full" in message and "RLHF_STORE_ENDPOINT" in message
