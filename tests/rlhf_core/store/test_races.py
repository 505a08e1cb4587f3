"""Several processes at once, and processes that are killed."""

import itertools
import os
import random
import signal
import time
from pathlib import Path

import pytest

from rlhf_core.store import FileEntry, Store, folders, open_store, rlhf_home
from rlhf_core.store import blobs as blobs_module
from rlhf_core.store.backend import Backend
from tests.rlhf_core.store.helpers import blobs, contents, results_of, start

KILLS = 6


@pytest.fixture
def many(tmp_path: Path) -> Path:
    made = tmp_path / "many"
    made.mkdir()
    noise = random.Random(0)
    for number in range(24):
        (made / f"{number:02}.bin").write_bytes(noise.randbytes(200_000))
    return made


def publish(url: str, folder: Path, metadata: dict[str, int]) -> str:
    return open_store(url).publish(folder, kind="model", metadata=metadata).digest


@pytest.mark.slow
def test_killed_publishers_leave_nothing_broken_and_a_rerun_completes(
    store: Store, many: Path
) -> None:
    began = time.monotonic()
    publish(store.url, many, {"round": -1})
    whole = time.monotonic() - began
    store.delete(store.list()[0].digest, blobs=True)
    moments = random.Random(1)
    visible = 0
    for number in range(KILLS):
        child = start(publish, store.url, many, {"round": number})
        time.sleep(moments.uniform(0, 1.2 * whole))
        child.kill()
        child.join()
        for artifact in open_store(store.url).list():
            visible += 1
            assert store.verify(artifact.digest) == []
            store.delete(artifact.digest, blobs=True)
    last = store.publish(many, kind="model", metadata={"round": 0})
    assert store.verify(last.digest) == []
    assert contents(store.fetch(last.digest)) == contents(many)
    assert store.list() == [last]
    store.sweep(older_than=-1)
    if store.url.startswith("file://"):
        left = (Path(store.url.removeprefix("file://")) / ".tmp").iterdir()
        assert [file for file in left if file.suffix == ".part"] == []


def test_racing_publishers_agree(store: Store, many: Path) -> None:
    digests = results_of(publish, [(store.url, many, {})] * 3)
    assert len(set(digests)) == 1
    assert len(store.list()) == 1 and len(blobs(store)) == 24
    assert store.verify(digests[0]) == []


def commit(url: str, digest: str) -> str:
    store = open_store(url)
    return store.commit_stage("key", store.get(digest)).digest


def test_racing_stages_agree_on_one_winner(store: Store, folder: Path) -> None:
    made = [store.publish(folder, kind="model", metadata={"n": n}).digest for n in range(3)]
    winners = results_of(commit, [(store.url, digest) for digest in made])
    assert len(set(winners)) == 1 and winners[0] in made
    result = store.stage_result("key")
    assert result is not None and result.digest == winners[0]


def create(url: str, number: int) -> bool:
    return open_store(url).write_record("runs/one.json", {"writer": number}, create=True)


def test_one_of_racing_creators_wins(store: Store) -> None:
    won = results_of(create, [(store.url, number) for number in range(4)])
    assert sorted(won) == [False, False, False, True]
    assert store.read_record("runs/one.json") == {"writer": won.index(True)}


def fetch(url: str, digest: str) -> Path:
    return open_store(url).fetch(digest)


def fetch_and_count(url: str, digest: str, counted: Path) -> Path:
    """Fetch, and append the bytes of each download to a file."""
    whole = blobs_module.download_blob

    def download(backend: Backend, entry: FileEntry, target: Path, owner: str) -> None:
        whole(backend, entry, target, owner)
        with open(counted, "a") as file:
            file.write(f"{entry.size}\n")

    vars(folders)["download_blob"] = download
    return fetch(url, digest)


def test_ranks_of_one_machine_share_one_download(store: Store, many: Path, tmp_path: Path) -> None:
    artifact, counted = store.publish(many, kind="model"), tmp_path / "counted"
    found = results_of(fetch_and_count, [(store.url, artifact.digest, counted)] * 4)
    cache = rlhf_home() / "cache" / "artifacts"
    assert found == [cache / artifact.digest] * 4
    assert sum(map(int, counted.read_text().split())) == artifact.size
    assert contents(cache / artifact.digest) == contents(many)
    assert [path.name for path in cache.iterdir()] == [artifact.digest]


def fetch_and_die(url: str, digest: str) -> None:
    """Fetch, and be killed after the fifth file with the next one half written."""
    whole = blobs_module.download_blob
    done = itertools.count(1)

    def download(backend: Backend, entry: FileEntry, target: Path, owner: str) -> None:
        whole(backend, entry, target, owner)
        if next(done) == 5:
            target.with_name(f".{'0' * 32}.part").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

    vars(folders)["download_blob"] = download
    fetch(url, digest)


def test_killed_fetch_shows_nothing_and_the_next_goes_on_from_it(
    tmp_path: Path, many: Path
) -> None:
    store = open_store(str(tmp_path / "store"))
    digest = store.publish(many, kind="model").digest
    child = start(fetch_and_die, store.url, digest)
    child.join(30)
    assert child.exitcode == -signal.SIGKILL
    cache = rlhf_home() / "cache" / "artifacts"
    assert not (cache / digest).exists()
    verified = {path.name: path.stat().st_ino for path in cache.glob(".*.part/*.bin")}
    assert len(verified) >= 5

    folder = store.fetch(digest)
    assert contents(folder) == contents(many)
    assert {name: (folder / name).stat().st_ino for name in verified} == verified
    assert [path.name for path in cache.iterdir()] == [digest]


def use_inherited(store: Store, digest: str) -> list[str]:
    return [*store.verify(digest), store.get(digest).digest]


def test_store_works_in_a_forked_child(store: Store, folder: Path) -> None:
    digest = store.publish(folder, kind="model").digest
    assert results_of(use_inherited, [(store, digest)] * 2) == [[digest]] * 2
    assert store.verify(digest) == []
