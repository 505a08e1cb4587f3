"""Power cuts, on an ext4 image that is copied while a process writes to it, and a disk that is full
(`make test-crash`).

The copy holds what the kernel has written to the device so far, as a disk does after a power cut.
It needs root, a loop device and mkfs.ext4.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.errors import StoreError
from rlhf_core.store import open_store, registry
from rlhf_core.store.collect import Limits
from rlhf_core.store.local import free_bytes
from rlhf_core.store.published_folder import materialise
from rlhf_core.store.s3 import synced
from rlhf_core.store.s3.seaweed import Seaweed
from rlhf_core.store.s3.synced import sync_changed
from tests.rlhf_core.store.helpers import contents

pytestmark = [pytest.mark.slow, pytest.mark.crash]

CUTS = 12
SIZE = 192 * 2**20


@contextmanager
def mounted(image: Path, at: Path) -> Iterator[Path]:
    at.mkdir(exist_ok=True)
    # Of its own accord the file system commits every five minutes only, so that all depends on us.
    done = subprocess.run(
        ["mount", "-o", "loop,commit=300", image, at], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"an image cannot be mounted here: {done.stderr.strip()}")
    try:
        yield at
    finally:
        subprocess.run(["umount", at], check=True)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    for needed in ("mkfs.ext4", "mount", "losetup"):
        if shutil.which(needed) is None:
            pytest.skip(f"{needed} is not installed: there is no disk to cut off")
    if os.geteuid() != 0:
        pytest.skip("only root can mount an image: there is no disk to cut off")
    path = tmp_path / "disk.img"
    with open(path, "wb") as file:
        file.truncate(SIZE)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", path], check=True)
    return path


def write(disk: Path, acknowledged: Path, seed: int) -> None:
    """Publish, commit, promote, fetch and record until killed; note each thing that is done."""
    chance, store = random.Random(seed), open_store(str(disk / "store"))
    with open(acknowledged, "a") as notes:
        for number in range(10_000):
            folder = disk / "work" / str(number)
            folder.mkdir(parents=True)
            for name in range(chance.choice([1, 3, 20])):
                (folder / f"{name}.bin").write_bytes(chance.randbytes(chance.choice([9, 40_000])))
            artifact = store.publish(folder, kind="model")
            print(json.dumps(["artifact", artifact.digest]), file=notes, flush=True)
            store.commit_stage(str(number), artifact)
            print(json.dumps(["stage", str(number), artifact.digest]), file=notes, flush=True)
            registry.promote(store, "name", artifact.digest)
            print(json.dumps(["champion", artifact.digest]), file=notes, flush=True)
            materialise(store, artifact, disk / "published")
            print(json.dumps(["folder", artifact.digest]), file=notes, flush=True)
            shutil.rmtree(folder)


def cut(process: subprocess.Popen[bytes], image: Path, copy: Path, notes: Path) -> list[list[str]]:
    """Copy the image at one moment; returns what was acknowledged before."""
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(0.05)
    done = [json.loads(line) for line in notes.read_text().splitlines()]
    subprocess.run(["cp", "--sparse=always", image, copy], check=True)
    os.kill(process.pid, signal.SIGCONT)
    return done


def check(disk: Path, done: list[list[str]], seen: dict[str, int]) -> None:
    """All that was acknowledged is there and whole, and nothing that is there is broken."""
    store = open_store(str(disk / "store"))
    for key in store._backend.keys(""):
        if key.endswith(".json"):
            assert json.loads((disk / "store" / key).read_bytes()), key
    for artifact in store.list():
        assert store.verify(artifact.digest) == []
    promoted = [digest for what, *_, digest in done if what == "champion"]
    for what, *name, digest in done:
        seen[what] = seen.get(what, 0) + 1
        assert store.get(digest)
        if what == "stage":
            assert store.stage_result(name[0]).digest == digest  # type: ignore[union-attr]
    if promoted:
        model = registry.read_model(store, "name")
        assert [t.digest for t in model.history][: len(promoted)] == promoted
    if any(what == "folder" for what, *_ in done):
        # one that was switched to later may not have been acknowledged
        found = contents(disk / "published")
        assert any(
            {entry.path: store.read_bytes(a.digest, entry.path) for entry in a.files} == found
            for a in store.list()
        )


def test_what_was_acknowledged_outlives_a_power_cut(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes, chance, seen = tmp_path / "done.jsonl", random.Random(0), dict[str, int]()
    notes.touch()
    monkeypatch.setenv("RLHF_HOME", str(tmp_path / "disk" / "home"))
    code = (
        "import sys, pathlib; from tests.rlhf_core.store.test_power_cut import write;"
        "write(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), 0)"
    )
    done = []
    with mounted(image, tmp_path / "disk") as disk:
        process = subprocess.Popen([sys.executable, "-c", code, str(disk), str(notes)])
        try:
            for number in range(CUTS):
                time.sleep(chance.uniform(0.1, 1.0))
                done.append(cut(process, image, tmp_path / f"{number}.img", notes))
        finally:
            process.kill()
            process.wait()
    for number in range(CUTS):
        with mounted(tmp_path / f"{number}.img", tmp_path / "after") as disk:
            check(disk, done[number], seen)
        (tmp_path / f"{number}.img").unlink()
    assert seen["champion"] > 20, f"too little was written between the cuts: {seen}"
    print(f"{CUTS} power cuts; acknowledged before them and whole after them: {seen}")


def test_seaweedfs_keeps_all_but_the_last_seconds_and_repair_clears_these(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers from memory; `keep_synced` syncs it from outside."""
    with open(image, "wb") as file:
        file.truncate(8 * SIZE)  # sparse; it wants a gigabyte
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    monkeypatch.setenv("RLHF_STORE_RETRIES", "1")  # an unreadable object is tried again in vain
    rounds: list[float] = []  # seconds that syncing took

    def timed(*arguments: Any) -> list[Path]:
        began = time.monotonic()
        try:
            return sync_changed(*arguments)
        finally:
            rounds.append(time.monotonic() - began)

    monkeypatch.setattr(synced, "sync_changed", timed)
    done: list[tuple[float, str]] = []
    with mounted(image, tmp_path / "disk") as disk:
        server = Seaweed(disk / "s3")
        server.start()
        try:
            for name, value in server.client_environment.items():
                monkeypatch.setenv(name, value)
            store = open_store()
            while not done or done[-1][0] - done[0][0] < 10:
                artifact = store.publish_derived(kind="model", files={"a": os.urandom(50_000)})
                store.commit_stage(artifact.digest, artifact)
                done.append((time.monotonic(), artifact.digest))
            assert server._process is not None
            (tmp_path / "none").touch()
            cut(server._process, image, tmp_path / "cut.img", tmp_path / "none")
        finally:
            server.kill()
            time.sleep(2)  # the syncing thread makes a last round
    with mounted(tmp_path / "cut.img", tmp_path / "disk"):
        server = Seaweed(tmp_path / "disk" / "s3", port=server._port)
        server.start()
        try:
            store = open_store()
            lost = store.repair(store.find_damage(), lost=True)
            # what is left is what cannot be healed: files that are gone
            assert {d.problem for d in store.find_damage()} <= {"the blob is missing"}
            there = {digest for _, digest in done if store.stage_result(digest) is not None}
            # What was written while a round ran is synced by the next one.
            late = synced.PAUSE_SECONDS + 2 * max(rounds) + 1
            old = {digest for when, digest in done if done[-1][0] - when > late}
            assert len(old) > 10 and old <= there
            print(
                f"{len(there)} of {len(done)} results are there; {len(lost)} objects are not; "
                f"syncing took up to {max(rounds):.1f} s"
            )
        finally:
            server.kill()
            time.sleep(2)


def test_collection_frees_a_disk_without_a_single_free_byte(image: Path, tmp_path: Path) -> None:
    with mounted(image, tmp_path / "disk") as disk:
        store = open_store(str(disk / "store"))
        kept = store.publish_derived(kind="model", files={"a": b"kept"})
        (tmp_path / "file").write_bytes(os.urandom(2**20))
        store.publish_derived(kind="model", files={"a": tmp_path / "file"})
        with pytest.raises(StoreError, match="no space left"):
            for number in range(10_000):
                store.write_record(f"runs/{number}.json", {"a": "b" * 2**20})
        with pytest.raises(OSError), open(disk / "filling", "wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        with pytest.raises(StoreError, match="no space left"):
            store.write_record("runs/another.json", {})
        before = free_bytes(disk)
        assert before == 0
        found = store.collect(lambda: {kept.digest}, Limits(keep=-10, grace=-10))
        assert len(found.blobs) == 1 and free_bytes(disk) >= 2**20
        assert store.verify(kept.digest) == []
        store.write_record("runs/another.json", {})
