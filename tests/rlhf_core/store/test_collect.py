"""Garbage collection: what goes, what stays, and writers that race it."""

import errno
import json
import random
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from botocore.awsrequest import AWSResponse

from rlhf_core.errors import StoreError
from rlhf_core.store import Artifact, Store, collect, leases, open_store, publishing
from rlhf_core.store.collect import Limits
from rlhf_core.store.publishing import incomplete
from tests.rlhf_core.store.helpers import blobs, start

EVERYTHING = Limits(keep=-10, grace=-10)  # even what was written this moment counts as old
NOTHING = Limits(keep=3600, grace=3600)


def made(store: Store, name: str, *parents: Artifact, **files: bytes) -> Artifact:
    return store.publish_derived(
        kind="model",
        files={"name": name.encode(), **files},
        parents=[parent.digest for parent in parents],
    )


def test_what_no_root_reaches_goes_and_the_rest_is_whole(store: Store) -> None:
    base = made(store, "base", shared=b"s" * 100)
    sft = made(store, "sft", base, weights=b"w" * 1000)
    kept = made(store, "ppo", sft)
    lost = made(store, "lost", base, shared=b"s" * 100, own=b"o" * 5000)
    store.commit_stage("kept", sft)
    store.commit_stage("lost", lost)
    before = store._backend.keys("")

    found = store.find_garbage(lambda: {kept.digest}, EVERYTHING)
    assert store._backend.keys("") == before
    assert [ref for ref, _ in found.artifacts] == [lost.ref] and found.kept == 3
    assert sum(entry.size for entry in found.blobs) == 5000 + len("lost")
    assert [entry.key for entry in found.others] == ["stages/lost.json"]

    again = store.collect(lambda: {kept.digest}, EVERYTHING)
    assert again.artifacts == found.artifacts and again.size == found.size
    left = set(before) - set(store._backend.keys(""))
    assert left == {entry.key for entry in found.entries} and len(left) == 4
    assert store.list() == [kept, sft, base]
    assert [store.verify(each.digest) for each in (base, sft, kept)] == [[], [], []]
    assert store.stage_result("lost") is None and store.stage_result("kept") == sft
    assert store.collect(lambda: {kept.digest}, EVERYTHING).entries == []


def test_what_is_young_stays(store: Store, folder: Path) -> None:
    artifact = store.publish(folder, kind="model")
    store._backend.write(f"blobs/sha256/ab/{'ab' * 32}", b"of a writer that is not done yet")
    store._backend.write("leases/a.json", b"{}")
    store.write_record("memory/stage.json", {"micro_batch_size": 2})
    store.scoped("checkpoints/key").publish(folder, kind="checkpoint")
    before = store._backend.keys("")
    assert store.collect(set, NOTHING).entries == []
    assert store._backend.keys("") == before
    # The artifact is old now, its files are not: they wait for the next time.
    assert len(store.collect(set, Limits(keep=3600, grace=-10)).blobs) == 1
    assert store.verify(artifact.digest) == []


def test_result_that_was_just_reused_and_leases_keep_their_artifacts(store: Store) -> None:
    reused, published, leased = (made(store, name) for name in ("reused", "published", "leased"))
    store.commit_stage("key", reused)
    # S3 tells times in whole seconds; the emulators of the clouds are slow.
    pause, grace = (3.5, 2) if store.url.startswith(("file:", "s3:")) else (12, 10)
    time.sleep(pause)
    assert store.stage_result("key") == reused
    assert made(store, "published") == published
    value = {"artifact": leased.digest, "blobs": [entry.sha256 for entry in leased.files]}
    store._backend.write("leases/writer.json", json.dumps(value).encode())
    limits = Limits(keep=grace, grace=grace)
    assert store.collect(set, limits).artifacts == []
    store._backend.delete("leases/writer.json")
    assert [ref for ref, _ in store.collect(set, limits).artifacts] == [leased.ref]


def test_abandoned_checkpoints_go_and_those_of_running_stages_stay(
    store: Store, folder: Path
) -> None:
    old, running = (store.scoped(f"checkpoints/{name}") for name in ("old", "running"))
    old.publish(folder, kind="checkpoint")
    time.sleep(3.5)
    newest = running.publish(folder, kind="checkpoint")
    found = store.collect(set, Limits(keep=2, grace=2))
    assert {entry.key.split("/")[1] for entry in found.checkpoints} == {"old"}
    assert store._backend.keys("checkpoints/old/") == []
    assert running.verify(newest.digest) == []


@pytest.mark.parametrize("folder", ["memory", "candidates"])
def test_old_records_about_a_failed_stage_go(store: Store, folder: str) -> None:
    store.write_record(f"{folder}/stage.json", {"micro_batch_size": 2})
    assert store.collect(set, NOTHING).others == []
    assert [e.key for e in store.collect(set, EVERYTHING).others] == [f"{folder}/stage.json"]
    assert store.list_records(f"{folder}/") == []


def test_uploads_that_killed_writers_left_are_ended_by_age(s3_url: str) -> None:
    store = open_store(s3_url)
    client = store._backend.client  # type: ignore[attr-defined]
    key = s3_url.split("/", 3)[3] + "/blobs/sha256/ab/abcd"
    client.request("create_multipart_upload", "starting", Key=key)
    assert store.collect(set, NOTHING).uploads == 0
    assert store.collect(set, EVERYTHING).uploads == 1


def test_damaged_manifest_that_is_kept_keeps_all_files(store: Store) -> None:
    kept, other = made(store, "kept"), made(store, "other")
    store._backend.write(f"artifacts/model/{kept.digest}/manifest.json", b"{")
    count = len(blobs(store))
    found = store.collect(lambda: {kept.digest}, EVERYTHING)
    assert kept.ref in found.notes[0] and found.blobs == []
    assert [ref for ref, _ in found.artifacts] == [other.ref]
    assert len(blobs(store)) == count


def test_writer_that_has_just_found_an_old_file_keeps_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    garbage = made(store, "garbage", weights=b"w" * 1000)
    commit = publishing._commit_new

    def collected_in_between(*arguments: object) -> Artifact | None:
        found = store.collect(set, Limits(keep=0, grace=0))
        assert [ref for ref, _ in found.artifacts] == [garbage.ref]
        return commit(*arguments)  # type: ignore[arg-type]

    time.sleep(1.5)
    monkeypatch.setattr(publishing, "_commit_new", collected_in_between)
    new = made(store, "new", weights=b"w" * 1000)
    assert store.list() == [new] and store.verify(new.digest) == []


def test_writer_waits_for_a_collection_and_sends_again_what_it_took(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(store, "garbage", weights=b"w" * 1000)
    delete, at_work, go_on = collect.delete_all, threading.Event(), threading.Event()

    def slow_delete(*arguments: object) -> None:
        at_work.set()
        assert go_on.wait(20)
        delete(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(collect, "delete_all", slow_delete)
    collector = threading.Thread(target=store.collect, args=(set, EVERYTHING))
    collector.start()
    assert at_work.wait(20)
    published: list[Artifact] = []
    writer = threading.Thread(
        target=lambda: published.append(made(store, "n", weights=b"w" * 1000))
    )
    writer.start()
    writer.join(1.5)
    assert writer.is_alive() and published == []
    go_on.set()
    collector.join()
    writer.join()
    assert store.list() == published and store.verify(published[0].digest) == []


def test_collector_that_died_does_not_hold_up_writers_for_ever(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "STALE_SECONDS", 1.0)
    store.publish(folder, kind="model")
    for name in ("gc/running.json", "gc/running-1.json"):  # of an earlier version, and of this one
        store._backend.write(name, b'{"beat": 1}')
    store.publish(folder, kind="model", metadata={"n": 2})
    assert store._backend.keys("gc/") == []


def test_writer_removes_no_flag_but_the_one_it_waited_for(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "STALE_SECONDS", 1.0)
    dead, other = leases.CollectionFlag(store._backend), leases.CollectionFlag(store._backend)
    store._backend.write(dead.key, b"{}")
    delete, left = store._backend.delete, []

    def late(key: str) -> None:
        if "running" in key and not left:  # the dead one is back and ends, another one begins
            delete(dead.key)
            with other:
                delete(key)
                left.extend(store._backend.keys(leases.FLAGS))
        else:
            delete(key)

    monkeypatch.setattr(store._backend, "delete", late)
    leases.wait_for_collector(store._backend)
    assert left == [other.key]


def test_dry_run_writes_nothing_and_a_collection_finds_space_on_a_full_disk(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path / "store"))
    artifact = store.publish(folder, kind="model")
    reserve, write = tmp_path / "store" / ".tmp" / "reserve", Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if reserve.exists() or path == reserve:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StoreError, match="no space left"):
        store.write_record("runs/a.json", {})
    assert [ref for ref, _ in store.find_garbage(set, EVERYTHING).artifacts] == [artifact.ref]
    assert len(store.collect(set, EVERYTHING).blobs) == 3
    assert blobs(store) == [] and not reserve.exists()
    monkeypatch.undo()
    store.publish(folder, kind="model")
    assert reserve.stat().st_size == 2**18


def test_server_without_an_operation_is_told_which_and_the_rest_is_collected(
    s3_url: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(s3_url)
    store.publish(folder, kind="model")
    client = store._backend.client.connected().client  # type: ignore[attr-defined]

    def lacking(request: object, **_: object) -> AWSResponse:
        body = b"<Error><Code>NotImplemented</Code></Error>"
        raw = SimpleNamespace(stream=lambda: iter([body]))
        return AWSResponse("http://here", 501, {"Content-Type": "application/xml"}, raw)

    client.meta.events.register("before-send.s3.ListMultipartUploads", lacking)
    found = store.collect(set, EVERYTHING)
    assert len(found.blobs) == 3 and blobs(store) == []
    assert "does not have the operation ListMultipartUploads (NotImplemented)" in found.notes[0]
    assert "full" not in found.notes[0]


def test_collector_that_was_taken_for_dead_stops(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = store.publish(folder, kind="model")
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.05)
    delete = collect.delete_all

    def overtaken(backend: object, garbage: object, flag: leases.CollectionFlag) -> None:
        end = time.monotonic() + 20
        while not flag._lost and time.monotonic() < end:
            store._backend.delete(flag.key)  # between its look and its write it is put back
            time.sleep(0.2)
        delete(backend, garbage, flag)  # type: ignore[arg-type]

    monkeypatch.setattr(collect, "delete_all", overtaken)
    with pytest.raises(StoreError, match="could not renew its flag"):
        store.collect(set, EVERYTHING)
    assert store.verify(artifact.digest) == []


SECONDS = 6.0
AGE = 3.0


def write_and_look(url: str, seed: int, broken: Path, stop: Path) -> None:
    """Publish artifacts of files that others have published before, and count broken ones."""
    store, chance = open_store(url), random.Random(seed)
    end = time.monotonic() + 20 * SECONDS
    while not stop.exists() and time.monotonic() < end:
        began = time.monotonic()
        files = {str(n): bytes([n]) * 500 for n in chance.sample(range(60), 3)}
        artifact = store.publish_derived(
            kind="model", files=files, metadata={"n": chance.randrange(10)}
        )
        store.commit_stage(str(seed), artifact)
        problems = incomplete(store._backend, artifact)
        if problems and time.monotonic() - began < AGE:
            (broken / f"{seed}-{time.monotonic()}").write_text("\n".join(problems))
        time.sleep(chance.uniform(0, 0.4))


@pytest.mark.slow
def test_writers_that_race_the_collector_lose_nothing(store: Store, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    stop = tmp_path / "stop"
    writers = [start(write_and_look, store.url, seed, broken, stop) for seed in range(3)]
    deleted, began = 0, time.monotonic()
    while any(writer.is_alive() for writer in writers):
        deleted += len(store.collect(set, Limits(keep=AGE, grace=AGE)).blobs)
        # Which files grow old is chance, and a busy machine makes few rounds.
        if deleted and time.monotonic() - began > SECONDS:
            stop.touch()
        time.sleep(0.2)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert [path.read_text() for path in broken.iterdir()] == []
    assert deleted > 0
