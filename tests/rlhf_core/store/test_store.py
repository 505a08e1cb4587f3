"""The store's promises, on a folder and on a real S3 server."""

import os
import pickle
from pathlib import Path

import pytest

from rlhf_core.errors import ArtifactNotFound, ConfigError, StoreError
from rlhf_core.store import FileEntry, Store, open_store, rlhf_home
from tests.rlhf_core.store.helpers import blobs, contents


def test_published_folder_is_fetched_as_it_was(store: Store, folder: Path, tmp_path: Path) -> None:
    artifact = store.publish(folder, kind="model", metadata={"loss": 0.5}, parents=["a" * 64])
    assert artifact.size == sum(map(len, contents(folder).values()))
    assert artifact.metadata == {"loss": 0.5} and artifact.parents == ("a" * 64,)

    fetched = store.fetch(artifact.digest)
    assert contents(fetched) == contents(folder)
    assert fetched == rlhf_home() / "cache" / "artifacts" / artifact.digest

    assert store.fetch(artifact.ref, tmp_path / "new" / "place") == tmp_path / "new" / "place"
    assert contents(tmp_path / "new" / "place") == contents(folder)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["place"]
    assert store.read_bytes(artifact.ref, "config.json") == b'{"hidden_size": 8}'
    assert store.verify(artifact.digest) == []


def test_files_of_several_writers_become_one_artifact_of_which_some_are_fetched(
    store: Store, tmp_path: Path
) -> None:
    one = tmp_path / "one"
    one.write_bytes(b"from a file")
    entries = [*store.upload({"one": one}), *store.upload({"two": b"from memory"})]
    assert store.list() == [], "not before it is published"
    artifact = store.publish_derived(kind="checkpoint", files={e.path: e for e in entries})
    assert contents(store.fetch(artifact.digest, tmp_path / "some", ["two", "three"])) == {
        "two": b"from memory"
    }
    assert contents(store.fetch(artifact.digest)) == {"one": b"from a file", "two": b"from memory"}


def test_publishing_a_changed_folder_sends_only_what_changed(store: Store, folder: Path) -> None:
    first = store.publish(folder, kind="model")
    before = blobs(store)
    assert len(before) == 3
    (folder / "config.json").write_text('{"hidden_size": 16}')
    second = store.publish(folder, kind="model")
    new = set(blobs(store)) - set(before)
    assert new == {f"blobs/sha256/{(sha := second.file('config.json').sha256)[:2]}/{sha}"}
    assert first.digest != second.digest


def test_publishing_the_same_again_returns_what_is_there(store: Store, folder: Path) -> None:
    first = store.publish(folder, kind="model", metadata={"a": 1})
    second = store.publish(folder, kind="model", metadata={"a": 1})
    assert (second, second.created) == (first, first.created)
    assert len(store.list()) == 1


def test_derived_artifact_takes_over_entries_without_sending_them(
    store: Store, folder: Path, tmp_path: Path
) -> None:
    model = store.publish(folder, kind="model")
    before = blobs(store)
    card = tmp_path / "card.txt"
    card.write_text("# card")
    weights = model.file("weights/model.bin")
    derived = store.publish_derived(
        kind="release",
        files={"model.bin": weights, "README.md": card, "note": b"bytes"},
        parents=[model.digest],
    )
    assert len(blobs(store)) == len(before) + 2
    assert contents(store.fetch(derived.digest)) == {
        "model.bin": (folder / "weights" / "model.bin").read_bytes(),
        "README.md": b"# card",
        "note": b"bytes",
    }


def test_derived_artifact_refuses_entries_that_the_store_lacks(store: Store) -> None:
    with pytest.raises(StoreError, match="x \\(3 bytes\\) has no blob"):
        store.publish_derived(kind="model", files={"y/x": FileEntry("x", 3, "0" * 64)})
    assert store.list() == []


def test_list_is_newest_first_and_by_kind(store: Store, folder: Path) -> None:
    made = [store.publish(folder, kind=k, metadata={"n": n}) for n, k in enumerate("aba")]
    assert store.list() == made[::-1]
    assert store.list("a") == [made[2], made[0]]
    assert open_store(store.url).list("none") == []


def test_references_resolve_and_errors_name_what_comes_near(store: Store, folder: Path) -> None:
    with pytest.raises(ArtifactNotFound, match="holds none"):
        store.get("abcdef")
    artifact = store.publish(folder, kind="model")
    digest = artifact.digest
    for ref in (digest, digest[:6], f"model/{digest}", f"model/{digest[:8]}", digest[:9].upper()):
        assert store.get(ref) == artifact
    with pytest.raises(ArtifactNotFound, match=f"model/{digest[:12]}"):
        store.get(digest[:7] + ("0" if digest[7] != "0" else "1"))
    with pytest.raises(ArtifactNotFound, match="is of kind model"):
        store.get(f"dataset/{digest[:8]}")
    for bad in (digest[:5], "latest", "", "../" + digest, digest + "0"):
        with pytest.raises(ConfigError, match="6 to 64 hex digits"):
            store.get(bad)
    with pytest.raises(ConfigError, match=r"config\.json"):
        store.read_bytes(digest, "missing")


def test_ambiguous_reference_lists_the_candidates(store: Store) -> None:
    # Manifests whose digests share a start cannot be made; their names are enough here.
    for digit in "01":
        store._backend.write(f"artifacts/model/{'abcdef' + digit * 58}/manifest.json", b"{}")
    with pytest.raises(ConfigError, match=r"matches 2 artifacts.*abcdef0000.*abcdef1111"):
        store.get("abcdef")


def test_records_are_written_read_listed_and_removed(store: Store) -> None:
    assert store.read_record("runs/a.json") is None
    assert store.write_record("runs/a.json", {"state": 1}, create=True) is True
    assert store.write_record("runs/a.json", {"state": 2}, create=True) is False
    assert store.read_record("runs/a.json") == {"state": 1}
    assert store.write_record("runs/a.json", {"state": 3, "t": (1, 2)}) is True
    store.write_record("models/chat/v1.json", {})
    assert store.read_record("runs/a.json") == {"state": 3, "t": [1, 2]}
    assert store.list_records("runs/") == ["runs/a.json"]
    assert store.list_records("models") == ["models/chat/v1.json"]
    store.delete_record("runs/a.json")
    store.delete_record("runs/a.json")
    assert store.list_records("runs/") == []


@pytest.mark.parametrize(
    "path", ["../a.json", "/a/b.json", "a.json", "runs/a", "blobs/a.json", "x/artifacts/a.json"]
)
def test_record_paths_are_checked(tmp_path: Path, path: str) -> None:
    store = open_store(str(tmp_path / "store"))
    with pytest.raises(ConfigError):
        store.write_record(path, {})


def test_stage_result_is_none_until_committed_and_when_files_are_lost(
    store: Store, folder: Path
) -> None:
    assert store.stage_result("key") is None
    artifact = store.publish(folder, kind="model")
    assert store.stage_work("key") == {}
    assert store.commit_stage("key", artifact, {"seconds": 2.5}) == artifact
    assert store.stage_result("key") == artifact

    other = store.publish(folder, kind="model", metadata={"second": True})
    assert store.commit_stage("key", other, {"seconds": 9.0}) == artifact
    assert store.stage_work("key") == {"seconds": 2.5}, "of the winner"

    store.delete(artifact.digest)
    assert store.stage_result("key") is None
    assert store.commit_stage("key", other) == other
    assert store.stage_result("key") == other
    assert store.stage_work("key") == {}
    store._backend.delete(blobs(store)[0])
    assert store.stage_result("key") is None


def test_scoped_store_is_apart_and_its_delete_keeps_shared_blobs(
    store: Store, folder: Path
) -> None:
    outer = store.publish(folder, kind="model")
    scope = store.scoped("checkpoints/key")
    assert scope.url == f"{store.url}/checkpoints/key"
    first = scope.publish(folder, kind="checkpoint", metadata={"step": 1})
    (folder / "config.json").write_text("changed")
    second = scope.publish(folder, kind="checkpoint", metadata={"step": 2})
    assert len(blobs(scope)) == 4
    assert store.list() == [outer] and scope.list() == [second, first]
    assert store.list_records("checkpoints/") == []

    scope.delete(first.digest, blobs=True)
    assert len(blobs(scope)) == 3
    assert scope.list() == [second] and scope.verify(second.digest) == []
    scope.delete(second.digest)
    assert len(blobs(scope)) == 3
    with pytest.raises(ArtifactNotFound):
        scope.get(second.digest)
    assert store.verify(outer.digest) == []


def test_check_passes_and_leaves_nothing(store: Store) -> None:
    store.check()
    assert store._backend.keys("") == []


def test_store_survives_pickling_without_its_keys(store: Store, folder: Path) -> None:
    artifact = store.publish(folder, kind="model")
    data = pickle.dumps(store)
    assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() not in data
    assert pickle.loads(data).get(artifact.digest) == artifact


def test_symlinks_are_refused(tmp_path: Path, folder: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    link = folder / "weights" / "link"
    for target in ("/etc/passwd", "model.bin", "/nowhere", ".."):
        link.symlink_to(target)
        with pytest.raises(ConfigError, match="symbolic link"):
            store.publish(folder, kind="model")
        link.unlink()
    assert store.list() == []


def test_empty_and_missing_folders_are_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    (tmp_path / "nothing" / "below").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds no files"):
        store.publish(tmp_path / "nothing", kind="model")
    with pytest.raises(ConfigError, match="is not a folder"):
        store.publish(tmp_path / "missing", kind="model")
    with pytest.raises(ConfigError, match="not a regular file"):
        store.publish_derived(kind="model", files={"a": tmp_path})


def test_fetch_into_a_folder_with_other_files_is_refused(tmp_path: Path, folder: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    artifact = store.publish(folder, kind="model")
    target = tmp_path / "target"
    target.mkdir()
    assert store.fetch(artifact.ref, target) == target
    assert store.fetch(artifact.ref, target) == target
    (target / "mine").write_text("keep")
    with pytest.raises(ConfigError, match="exists and is not artifact"):
        store.fetch(artifact.ref, target)
    assert (target / "mine").read_text() == "keep"
