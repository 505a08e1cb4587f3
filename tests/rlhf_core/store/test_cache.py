"""The local copies: their limit, who goes first, and who may not go."""

import hashlib
import os
import random
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from rlhf_core.errors import StoreError
from rlhf_core.store import Artifact, FileEntry, Store, cache, open_store, rlhf_home
from rlhf_core.store.artifact import dump_manifest, make_artifact
from rlhf_core.store.blobs import blob_key
from rlhf_core.store.refs import manifest_key
from tests.rlhf_core.store.helpers import FORK, contents, results_of, start

SIZE = 100_000


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def made(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[Artifact]:
    """Five artifacts, of which two and a half have room."""
    monkeypatch.setenv("RLHF_STORE_CACHE_GB", str(2.5 * SIZE / 1e9))
    noise = random.Random(0)
    return [
        store.publish_derived(kind="model", files={"w.bin": noise.randbytes(SIZE)})
        for _ in range(5)
    ]


def cached() -> set[str]:
    return {path.name for path in (rlhf_home() / "cache" / "artifacts").iterdir()}


def fetch(url: str, digest: str) -> str:
    return str(open_store(url).fetch(digest))


def fetch_in_a_child(store: Store, artifact: Artifact) -> None:
    assert results_of(fetch, [(store.url, artifact.digest)])[0].endswith(artifact.digest)


def test_least_recently_used_copy_goes_first(store: Store, made: list[Artifact]) -> None:
    a, b, c = made[:3]
    for artifact in (a, b, a, c):
        fetch_in_a_child(store, artifact)
        time.sleep(0.02)
    assert cached() == {a.digest, c.digest}
    fetch_in_a_child(store, b)
    assert cached() == {b.digest, c.digest}
    stamps = {path.stem for path in (rlhf_home() / "cache" / "stamps").iterdir()}
    assert stamps == cached()


def use(url: str, digest: str, ready: Event) -> None:
    fetch(url, digest)
    ready.set()
    time.sleep(60)


def test_copy_that_a_process_uses_stays_until_that_is_killed(
    store: Store, made: list[Artifact], caplog: pytest.LogCaptureFixture
) -> None:
    ready = FORK.Event()
    user = start(use, store.url, made[0].digest, ready)
    assert ready.wait(20)
    own = store.fetch(made[1].digest)
    for artifact in made[2:]:
        fetch_in_a_child(store, artifact)
    assert cached() == {made[0].digest, made[1].digest, made[4].digest}
    assert (own / "w.bin").stat().st_size == SIZE
    user.kill()
    user.join()
    fetch_in_a_child(store, made[2])
    assert cached() == {made[1].digest, made[2].digest}


def test_copies_go_when_the_disk_has_no_room(
    store: Store, made: list[Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_STORE_CACHE_GB", "100")
    for artifact in made[:2]:
        fetch_in_a_child(store, artifact)
    monkeypatch.setattr("rlhf_core.store.cache.free_bytes", lambda _: SIZE // 2)
    store.fetch(made[2].digest)
    assert cached() == {made[1].digest, made[2].digest}


@pytest.mark.parametrize("size", [SIZE + 1, 10**15])
def test_nothing_goes_for_an_artifact_that_cannot_come(
    store: Store, made: list[Artifact], size: int
) -> None:
    a, b, c = made[:3]
    for artifact in (a, b):
        fetch_in_a_child(store, artifact)
    # A manifest with a size that its blob does not have, or that no disk has.
    wrong = make_artifact("model", [FileEntry("w.bin", size, c.files[0].sha256)], {}, [])
    store._backend.write(manifest_key("model", wrong.digest), dump_manifest(wrong))
    with pytest.raises(StoreError, match=r"w\.bin.* a blob of 100,000 bytes|only [0-9,]+ are free"):
        store.fetch(wrong.digest)
    store._backend.delete(blob_key(c.files[0].sha256))
    with pytest.raises(StoreError, match="has no blob"):
        store.fetch(c.digest)
    assert cached() == {a.digest, b.digest}


def test_what_a_killed_download_left_goes_as_well(store: Store, made: list[Artifact]) -> None:
    left = rlhf_home() / "cache" / "artifacts" / f".{made[4].digest}.somewhere.part"
    left.mkdir(parents=True)
    (left / "w.bin").write_bytes(b"x" * SIZE)
    os.utime(left, (1, 1))
    for artifact in made[:2]:
        fetch_in_a_child(store, artifact)
    assert cached() == {made[0].digest, made[1].digest}


def fetch_and_compare(url: str, digests: list[str], seed: int, seconds: float) -> int:
    """One process after another, each of which fetches an artifact and reads it."""
    chance, count = random.Random(seed), 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        child = start(read_whole, url, chance.choice(digests))
        child.join(30)
        if child.exitcode != 0:
            raise RuntimeError(f"a reader ended with {child.exitcode}")
        count += 1
    return count


def read_whole(url: str, digest: str) -> None:
    store = open_store(url)
    folder = store.fetch(digest)
    for _ in range(3):
        data = (folder / "w.bin").read_bytes()
        assert hashlib.sha256(data).hexdigest() == store.get(digest).files[0].sha256
        time.sleep(0.01)


@pytest.mark.slow
def test_readers_find_whole_copies_while_others_push_them_out(
    store: Store, made: list[Artifact]
) -> None:
    digests = [artifact.digest for artifact in made]
    want = {artifact.digest: artifact.files[0].sha256 for artifact in made}
    children = [
        FORK.Process(target=fetch_and_compare, args=(store.url, digests, seed, 4.0))
        for seed in range(3)
    ]
    for child in children:
        child.start()
    seen = set()
    while any(child.is_alive() for child in children):
        for digest in digests:  # a reader that holds nothing: what it can open has been verified
            path = rlhf_home() / "cache" / "artifacts" / digest / "w.bin"
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                continue
            assert hashlib.sha256(data).hexdigest() == want[digest]
            seen.add(digest)
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert seen == set(digests)
    missing = next(artifact for artifact in made if artifact.digest not in cached())
    fetch_in_a_child(store, missing)
    assert len(cached()) == 2 and missing.digest in cached()


def test_copy_that_goes_while_it_is_measured_counts_as_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here", "going"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / "w.bin").write_bytes(b"1234")
    scandir = os.scandir

    def removed(path: object) -> object:
        if "going" in str(path):
            raise FileNotFoundError(str(path))
        return scandir(path)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "scandir", removed)
    assert [cache._size(tmp_path / name) for name in ("here", "going")] == [4, 0]


def test_copy_that_was_pushed_out_is_fetched_again(store: Store, made: list[Artifact]) -> None:
    for artifact in [*made, made[0]]:
        fetch_in_a_child(store, artifact)
    folder = rlhf_home() / "cache" / "artifacts" / made[0].digest
    assert contents(folder) == {"w.bin": store.read_bytes(made[0].digest, "w.bin")}
