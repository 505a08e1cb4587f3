"""Stored bytes that are not what they were."""

import os
from pathlib import Path

import pytest

from rlhf_core.errors import ArtifactCorrupt, StoreError
from rlhf_core.runtime import candidates
from rlhf_core.store import Store, open_store, registry, rlhf_home
from rlhf_core.store.blobs import blob_key
from rlhf_core.store.refs import manifest_key
from tests.rlhf_core.store.helpers import contents, flip_bit, overwrite_blob


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_damaged_blob_is_found_and_the_cache_stays_clean(
    store: Store, folder: Path, tmp_path: Path, damage: str
) -> None:
    artifact = store.publish(folder, kind="model")
    entry = artifact.file("weights/model.bin")
    good = (folder / entry.path).read_bytes()
    if damage == "missing":
        store._backend.delete(blob_key(entry.sha256))
    else:
        overwrite_blob(store, entry, flip_bit(good) if damage == "flipped" else good[:-100])

    words = {"flipped": "sha256", "cut": "bytes instead of", "missing": "missing"}[damage]
    for destination in (None, tmp_path / "to"):
        with pytest.raises(ArtifactCorrupt, match=rf"weights/model\.bin.*({words}|sha256)"):
            store.fetch(artifact.ref, destination)
    assert list((rlhf_home() / "cache" / "artifacts").iterdir()) == []
    assert not (tmp_path / "to").exists()
    assert not list(tmp_path.glob(".*.part"))
    with pytest.raises(ArtifactCorrupt):
        store.read_bytes(artifact.ref, entry.path)
    problems = store.verify(artifact.ref)
    assert len(problems) == 1 and entry.path in problems[0] and words in problems[0]

    [found] = store.find_damage()
    assert (found.what, found.artifacts) == ("file", (f"model/{artifact.digest}",))
    assert words in found.problem
    assert store.repair([found], [folder])[0].done == f"replaced by {folder / entry.path}"
    assert store.find_damage() == []
    assert contents(store.fetch(artifact.ref)) == contents(folder)


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_publishing_again_puts_a_cut_or_missing_blob_right(
    store: Store, folder: Path, damage: str
) -> None:
    artifact = store.publish(folder, kind="model")
    entry = artifact.file("weights/model.bin")
    if damage == "missing":
        store._backend.delete(blob_key(entry.sha256))
    else:
        overwrite_blob(store, entry, b"short")
    assert store.publish(folder, kind="model") == artifact
    assert store.verify(artifact.ref) == []


def test_damaged_manifest_is_reported_left_out_of_lists_and_can_be_deleted(
    store: Store, folder: Path
) -> None:
    good = store.publish(folder, kind="model")
    bad = store.publish(folder, kind="model", metadata={"second": True})
    store._backend.write(f"artifacts/model/{bad.digest}/manifest.json", b'{"schema": 1')
    fresh = open_store(store.url)
    with pytest.raises(ArtifactCorrupt, match="cannot be read"):
        fresh.get(bad.digest)
    assert fresh.list() == [good]
    fresh.delete(bad.digest, blobs=True)
    assert fresh.verify(good.digest) == []


def test_changed_file_in_the_cache_is_replaced(tmp_path: Path, folder: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    artifact = store.publish(folder, kind="model")
    cached = store.fetch(artifact.ref) / "weights" / "model.bin"
    good = cached.read_bytes()
    cached.write_bytes(flip_bit(good))
    os.utime(cached, ns=(1, 1))
    store.fetch(artifact.ref)
    assert cached.read_bytes() == good
    cached.unlink()
    store.fetch(artifact.ref)
    assert cached.read_bytes() == good


def test_file_that_changes_while_it_is_published_is_refused(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path / "store"))
    upload = store._backend.upload

    def upload_late(source: Path, *arguments: object, **options: object) -> None:
        if source.name == "model.bin":
            source.write_bytes(b"something else")
        upload(source, *arguments, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(store._backend, "upload", upload_late)
        with pytest.raises(StoreError, match=r"model\.bin changed while"):
            store.publish(folder, kind="model")
    assert store.list() == []
    assert store.verify(store.publish(folder, kind="model").digest) == []


def test_record_that_cannot_be_read_counts_as_not_there(store: Store) -> None:
    for data in (b"", b'{"kind": "mo', bytes(40), b"[]"):
        store._backend.write("runs/a.json", data)
        assert store.read_record("runs/a.json") is None
        with pytest.raises(ArtifactCorrupt, match=r"runs/a\.json"):
            store.read_record("runs/a.json", strict=True)


def test_last_record_of_a_model_that_names_nothing_does_not_mean_that_it_has_no_champion(
    store: Store, folder: Path
) -> None:
    good, other = store.publish(folder, kind="model"), store.publish_derived(kind="model", files={})
    registry.promote(store, "chat", good.digest)
    registry.promote(store, "other", other.digest)
    for record in (
        {},
        {"digest": 1},
        {"digest": "d", "order": "1"},
        {"versions": [], "champion": 3},
    ):
        store.write_record("models/chat/log/00000002.json", record)
        for read in (registry.champion, registry.read_model):
            with pytest.raises(ArtifactCorrupt, match=r"chat/log/00000002\.json"):
                read(store, "chat")
        assert registry.newest_champion(store) == other.digest


@pytest.mark.parametrize("data", [b"", bytes(40)])
def test_stage_whose_record_or_manifest_cannot_be_read_runs_again_and_replaces_it(
    store: Store, folder: Path, data: bytes
) -> None:
    artifact = store.publish(folder, kind="model")
    store.commit_stage("key", artifact)
    store._backend.write("stages/key.json", data)
    assert store.stage_result("key") is None and store.stage_work("key") == {}
    assert store.commit_stage("key", artifact, {"seconds": 3.0}) == artifact
    assert store.stage_work("key") == {"seconds": 3.0}

    store._backend.write(manifest_key("model", artifact.digest), data)
    assert open_store(store.url).stage_result("key") is None
    assert store.publish(folder, kind="model") == artifact
    assert open_store(store.url).stage_result("key") == artifact


def test_candidate_whose_record_or_manifest_cannot_be_read_is_none(
    store: Store, folder: Path
) -> None:
    artifact = store.publish(folder, kind="model")
    candidates.write(store, "key", artifact)
    assert candidates.read(store, "key") == artifact
    store._backend.write(manifest_key("model", artifact.digest), b"")
    assert candidates.read(store, "key") is None
    for data in (b"", b"{}", b'{"kind": "model"}'):
        store._backend.write("candidates/key.json", data)
        assert candidates.read(store, "key") is None
    candidates.write(store, "key", None)
    assert store.list_records("candidates/") == []


def test_checkpoint_with_a_damaged_manifest_does_not_keep_others_from_being_deleted(
    store: Store, folder: Path
) -> None:
    old, bad, new = (store.publish(folder, kind="checkpoint", metadata={"n": n}) for n in "abc")
    store._backend.write(manifest_key("checkpoint", bad.digest), b"")
    fresh = open_store(store.url)
    fresh.delete(old.digest, blobs=True)
    assert fresh.list() == [new] and fresh.verify(new.digest) == []
