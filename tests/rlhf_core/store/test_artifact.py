import hashlib
import json
from pathlib import Path

import pytest

from rlhf_core.errors import ArtifactCorrupt, ConfigError
from rlhf_core.store import FileEntry, open_store
from rlhf_core.store.artifact import (
    canonical,
    check_path,
    dump_manifest,
    make_artifact,
    parse_manifest,
)

SHA = hashlib.sha256(b"x").hexdigest()


def test_digest_is_the_sha256_of_the_canonical_manifest_without_its_time() -> None:
    artifact = make_artifact("model", [FileEntry("b", 1, SHA)], {"loss": 0.5, "a": [1]}, [SHA])
    # Written out by hand: a change here breaks every store that people have.
    text = (
        '{"files":[{"path":"b","sha256":"' + SHA + '","size":1}],"kind":"model",'
        '"metadata":{"a":[1],"loss":0.5},"parents":["' + SHA + '"],"schema":1}'
    )
    assert artifact.digest == hashlib.sha256(text.encode()).hexdigest()
    later = make_artifact(
        "model", [FileEntry("b", 1, SHA)], {"a": (1,), "loss": 0.5}, [SHA], "2099"
    )
    assert later == artifact and later.digest == artifact.digest


@pytest.mark.parametrize(
    "other",
    [
        ("dataset", [FileEntry("b", 1, SHA)], {}, []),
        ("model", [FileEntry("c", 1, SHA)], {}, []),
        ("model", [FileEntry("b", 1, SHA)], {"a": 1}, []),
        ("model", [FileEntry("b", 1, SHA)], {}, [SHA]),
    ],
)
def test_digest_changes_with_each_part(other: tuple[object, ...]) -> None:
    assert make_artifact("model", [FileEntry("b", 1, SHA)], {}, []).digest != (
        make_artifact(*other).digest  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    "path", ["", "/etc/passwd", "..", "../x", "a/../b", "a//b", "./a", "a/", "a\\b", "a\nb", "a\0b"]
)
def test_paths_that_leave_the_folder_are_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="relative path"):
        check_path(path)


def test_paths_with_spaces_and_other_scripts_are_kept() -> None:
    assert check_path("a b/模型.bin") == "a b/模型.bin"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([FileEntry("a", 1, SHA), FileEntry("a", 1, SHA)], "duplicate"),
        ([FileEntry("a", 1, SHA), FileEntry("a/b", 1, SHA)], "also a folder"),
        ([FileEntry("a", 1, "short")], "sha256"),
        ([FileEntry("README.md", 1, SHA), FileEntry("readme.md", 1, SHA)], "ignores case"),
        ([FileEntry("\u00e9", 1, SHA), FileEntry("e\u0301", 1, SHA)], "ignores case"),
        ([FileEntry("A", 1, SHA), FileEntry("a/b", 1, SHA)], "also a folder"),
    ],
)
def test_clashing_files_are_refused(files: list[FileEntry], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_artifact("model", files, {}, [])


@pytest.mark.parametrize("kind", ["", "Model", "a/b", "..", "-x", "a" * 65])
def test_kinds_that_are_no_slug_are_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match="slug"):
        make_artifact(kind, [], {}, [])


@pytest.mark.parametrize("metadata", [{"a": float("nan")}, {"a": object()}])
def test_metadata_that_is_not_json_is_refused(metadata: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="metadata"):
        make_artifact("model", [], metadata, [])


def test_manifest_reads_back_and_any_change_is_noticed() -> None:
    artifact = make_artifact("model", [FileEntry("b", 1, SHA)], {"ü": 1}, [])
    data = dump_manifest(artifact)
    read = parse_manifest(data, "key", artifact.digest)
    assert read == artifact and read.created == artifact.created
    changed = json.loads(data)
    changed["files"][0]["path"] = "../../b"
    for bad in (json.dumps(changed).encode(), data.replace(b'"b"', b'"c"'), data[:-5], b"[]", b"1"):
        with pytest.raises(ArtifactCorrupt, match="manifest key"):
            parse_manifest(bad, "key", artifact.digest)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("metadata", True), ("metadata", [1]), ("kind", 3), ("parents", "ab"), ("created", 5),
        ("files", {"a": 1}), ("size", True), ("size", 1.0), ("path", None), ("sha256", []),
        ("files", [["a", 1]]),
    ],
)  # fmt: skip
def test_manifest_whose_digest_fits_but_not_its_types_is_corrupt(name: str, value: object) -> None:
    """As a hostile writer would make it: a `created` that is a number would break every list."""
    made = json.loads(dump_manifest(make_artifact("model", [FileEntry("b", 1, SHA)], {}, [])))
    (made["files"][0] if name in made["files"][0] else made)[name] = value
    covered = {key: part for key, part in made.items() if key != "created"}
    digest = hashlib.sha256(canonical(covered)).hexdigest()
    with pytest.raises(ArtifactCorrupt, match="manifest key cannot be read"):
        parse_manifest(json.dumps(made).encode(), "key", digest)


@pytest.mark.parametrize(
    ("kind", "digest"),
    [
        ("../../x", "0" * 64),
        ("model", "../" + "0" * 61),
        ("model", 5),
        (None, "0" * 64),
        ("model", "ab"),
    ],
)
def test_stage_record_that_names_no_artifact_means_that_the_stage_is_not_done(
    tmp_path: Path, kind: object, digest: object
) -> None:
    store = open_store(f"file://{tmp_path}")
    store.write_record("stages/k.json", {"kind": kind, "digest": digest})
    assert store.stage_result("k") is None


def test_deeply_nested_manifest_is_corrupt() -> None:
    with pytest.raises(ArtifactCorrupt, match="manifest key cannot be read"):
        parse_manifest(b"[" * 99_999, "key", "0" * 64)


@pytest.mark.parametrize("path", ["..", "/etc/passwd", "a/../../b", "a\0b", "a\\..\\b", ""])
def test_manifest_with_a_path_out_of_its_folder_is_corrupt(path: str) -> None:
    made = json.loads(dump_manifest(make_artifact("model", [FileEntry("b", 1, SHA)], {}, [])))
    made["files"][0]["path"] = path
    covered = {key: part for key, part in made.items() if key != "created"}
    digest = hashlib.sha256(canonical(covered)).hexdigest()
    with pytest.raises(ArtifactCorrupt, match="relative path"):
        parse_manifest(json.dumps(made).encode(), "key", digest)
