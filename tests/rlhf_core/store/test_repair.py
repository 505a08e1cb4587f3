"""Repair and deletion, on a folder and on a real S3 server."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from botocore.awsrequest import AWSPreparedRequest, AWSResponse

from rlhf_core.errors import ArtifactNotFound, ObjectUnreadable, StoreError
from rlhf_core.store import Artifact, Store, leases, open_store, registry
from rlhf_core.store.blobs import blob_key
from rlhf_core.store.collect import Limits
from rlhf_core.store.refs import manifest_key
from rlhf_core.store.s3.client import Connection, S3Client
from tests.rlhf_core.store.helpers import blobs, flip_bit, overwrite_blob


def made(store: Store, name: str, **files: bytes) -> Artifact:
    return store.publish_derived(kind="model", files={"name": name.encode(), **files})


def full(artifact: Artifact) -> str:
    return f"{artifact.kind}/{artifact.digest}"


def test_damage_is_found_healed_from_the_cache_or_cleared_away(
    store: Store, tmp_path: Path
) -> None:
    good = made(store, "good", shared=b"s" * 500)
    cached, lost = made(store, "c", w=b"c" * 900), made(store, "l", w=b"l" * 900)
    gone, scope = made(store, "g"), store.scoped("checkpoints/key")
    for artifact in (cached, lost):
        store.commit_stage(artifact.digest, artifact)
    store.fetch(cached.digest)
    checkpoint = scope.publish_derived(kind="checkpoint", files={"a": b"a"})
    overwrite_blob(store, cached.file("w"), b"c" * 899)
    overwrite_blob(store, lost.file("w"), flip_bit(b"l" * 900))
    store._backend.delete(blob_key(gone.file("name").sha256))
    store._backend.write(f"checkpoints/key/{manifest_key('checkpoint', checkpoint.digest)}", b"")
    store.write_record("runs/good.json", {})
    store._backend.write("runs/bad.json", b'{"id": ')
    assert store.stage_result(lost.digest) == lost  # of the right size, so it is not noticed

    before = store._backend.keys("")
    found = store.find_damage()
    assert store._backend.keys("") == before
    assert {(d.scope, d.what, d.artifacts) for d in found} == {
        ("", "record", ()),
        ("", "file", (full(cached),)),
        ("", "file", (full(lost),)),
        ("", "file", (full(gone),)),
        ("checkpoints/key/", "manifest", (full(checkpoint),)),
    }
    assert not any(d.done or d.healed for d in found)
    done = store.repair(found)
    assert [d.artifacts for d in done if d.healed] == [(full(cached),)]
    assert store._backend.read("quarantine/runs/bad.json") == b'{"id": '
    assert store.read_record("runs/bad.json") is None

    fresh = open_store(store.url)
    assert fresh.verify(cached.digest) == [] and fresh.stage_result(cached.digest) == cached
    assert fresh.stage_result(lost.digest) is None
    assert {d.artifacts for d in fresh.find_damage()} == {(full(gone),), (full(lost),)}
    assert made(fresh, "l", w=b"l" * 900) == lost and made(fresh, "g") == gone
    assert fresh.find_damage() == [] and fresh.verify(lost.digest) == []
    assert fresh.stage_result(lost.digest) == lost and fresh.verify(good.digest) == []
    assert fresh.collect(lambda: {good.digest}, Limits(keep=-10, grace=-10)).size > 0
    assert fresh._backend.keys("quarantine/") == []


def test_what_was_replaced_since_it_was_found_is_left_alone(store: Store) -> None:
    artifact = made(store, "a")
    key = manifest_key("model", artifact.digest)
    store._backend.write(key, b"")
    overwrite_blob(store, artifact.file("name"), b"bb")
    store._backend.write("runs/a.json", b"")
    found = store.find_damage()
    assert {d.what for d in found} == {"manifest", "file", "record"}
    assert made(store, "a") == artifact
    store.write_record("runs/a.json", {"id": "a"})
    assert {d.done for d in store.repair(found)} == {"nothing: it has been replaced meanwhile"}
    assert store.find_damage() == [] and store.list() == [artifact]


def test_record_that_is_written_while_repair_looks_at_it_stays(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "runs/a.json"
    store._backend.write(key, b"")
    found = store.find_damage()
    write = type(store._backend).write

    def late(backend: object, at: str, data: bytes) -> None:
        write(backend, at, data)  # type: ignore[arg-type]
        if at == f"quarantine/{key}":
            write(backend, key, b'{"id": "a"}')  # type: ignore[arg-type]

    monkeypatch.setattr(type(store._backend), "write", late)
    assert [d.done for d in store.repair(found)] == ["nothing: it has been replaced meanwhile"]
    assert store.read_record(key) == {"id": "a"}
    assert store._backend.read(f"quarantine/{key}") == b""


def test_damaged_record_of_a_model_is_set_aside_or_rebuilt(store: Store) -> None:
    a, b, c = (made(store, name).digest for name in "abc")
    registry.promote(store, "chat", a)
    registry.promote(store, "chat", b)
    registry.add_candidate(store, "chat", c)
    registry.promote(store, "other", c)
    for number in (2, 3):
        store._backend.write(f"models/chat/log/{number:08}.json", b"")
        store.repair(store.find_damage())
        model = registry.read_model(store, "chat")
        # The second is rebuilt from the third, which is lost: nothing follows it.
        assert model.champion is not None and model.champion.digest == b
        assert registry.champion(store, "chat") == b
        assert [v.digest for v in model.versions] == ([a, b, c] if number == 2 else [a, b])
    assert registry.newest_champion(store) == c
    assert registry.promote(store, "chat", a) is not None


def test_artifact_is_deleted_with_the_files_that_no_other_has(store: Store) -> None:
    kept = made(store, "kept", shared=b"s" * 100)
    going = made(store, "going", shared=b"s" * 100, own=b"o" * 1000)
    store.commit_stage("key", going)
    assert store.delete_unused(going.digest, 3600).blobs == []  # too young
    assert store.list() == [kept] and store.stage_result("key") is None
    assert made(store, "going", shared=b"s" * 100, own=b"o" * 1000) == going
    with leases.lease(store._backend, going), pytest.raises(StoreError, match="a writer is"):
        store.delete_unused(going.digest, -10)
    gone = store.delete_unused(going.digest, -10)
    assert sum(entry.size for entry in gone.blobs) == 1000 + len("going")
    assert len(blobs(store)) == 2 and store.verify(kept.digest) == []
    with pytest.raises(ArtifactNotFound):
        store.delete_unused(f"model/{going.digest}", -10)


def test_what_a_server_lists_and_cannot_read_is_cleared_away_on_demand_only(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_STORE_RETRIES", "0")
    store = open_store(s3_url)
    artifact, other = made(store, "a", w=b"w" * 900), made(store, "b")
    for each in (artifact, other):
        store.commit_stage(each.digest, each)
    sick = [blob_key(artifact.file("w").sha256), f"stages/{artifact.digest}.json"]
    body = SimpleNamespace(stream=lambda: iter([b"<Error><Code>InternalError</Code></Error>"]))
    connected = S3Client.connected

    def failing(request: AWSPreparedRequest, **_: object) -> AWSResponse | None:
        if request.method != "GET" or not request.url.partition("?")[0].endswith(tuple(sick)):
            return None
        return AWSResponse(request.url, 500, {"Content-Type": "application/xml"}, body)

    def watched(self: S3Client) -> Connection:
        connection = connected(self)
        connection.client.meta.events.register("before-send.s3", failing, unique_id="sick")
        return connection

    monkeypatch.setattr(S3Client, "connected", watched)
    with pytest.raises(ObjectUnreadable, match=r"has an entry for stages/.*repair --lost"):
        store.stage_result(artifact.digest)
    found = store.find_damage()
    assert [(d.what, d.unreadable) for d in found] == [("record", True), ("file", True)]
    assert not any(d.healed for d in store.repair(found)) and store.find_damage() == found
    assert [d.done for d in store.repair(found, lost=True)] == ["deleted", "deleted"]
    sick.clear()
    assert store.stage_result(artifact.digest) is None and store.stage_result(other.digest) == other
    assert made(store, "a", w=b"w" * 900) == artifact and store.verify(artifact.digest) == []
