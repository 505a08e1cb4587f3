"""Manifests and paths: what is read is exactly what was published, or ArtifactCorrupt."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import strategies as st

from rlhf_core.errors import ArtifactCorrupt, ConfigError
from rlhf_core.store import Artifact, FileEntry, open_store
from rlhf_core.store.artifact import (
    canonical,
    check_path,
    dump_manifest,
    make_artifact,
    parse_manifest,
)
from rlhf_core.store.refs import manifest_key
from tests.fuzz.cases import try_cases
from tests.fuzz.values import anything, damaged, nested, texts

pytestmark = pytest.mark.slow

hashes = st.sampled_from([hashlib.sha256(bytes([n])).hexdigest() for n in range(4)])
parts = st.one_of(
    st.sampled_from(
        ["a", "A", "b", "..", ".", "", "/", "é", "e\u0301", "ﬁ", "fi", "ß", "ss", "a:b"]
    ),
    texts,
)
paths = st.lists(parts, min_size=1, max_size=3).map("/".join)
plain = nested(st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5))
entries = st.builds(FileEntry, st.text("abcd./", min_size=1, max_size=6), st.integers(0, 9), hashes)


@st.composite
def artifacts(draw: st.DrawFn) -> Artifact:
    files = {e.path: e for e in draw(st.lists(entries, max_size=4))}
    metadata = draw(st.dictionaries(st.text(max_size=3), plain, max_size=3))
    try:
        return make_artifact("model", files.values(), metadata, draw(st.lists(hashes, max_size=2)))
    except ConfigError:
        return make_artifact("model", [FileEntry("a", 1, "0" * 64)], metadata, [])


@st.composite
def manifests(draw: st.DrawFn) -> tuple[bytes, str]:
    """(manifest, digest that its key has): often one that a hostile writer has made to fit."""
    artifact = draw(artifacts())
    value = json.loads(dump_manifest(artifact))
    kind = draw(st.sampled_from(["none", "bytes", "field", "field", "file", "file", "file"]))
    if kind == "bytes":
        return draw(damaged(dump_manifest(artifact))), artifact.digest
    value = copy.deepcopy(value)
    if kind == "field":
        name = draw(st.sampled_from(sorted(value)))
        value[name] = draw(anything)
    if kind == "file":
        other = [{"path": draw(paths), "size": 1, "sha256": "0" * 64} for _ in range(2)]
        value["files"] += other
        target = draw(st.sampled_from(value["files"]))
        if draw(st.booleans()):
            target[draw(st.sampled_from(sorted(target)))] = draw(anything)
    text = json.dumps(value).encode()
    try:  # the digest that such a manifest would have
        covered = {name: part for name, part in value.items() if name != "created"}
        digest = hashlib.sha256(canonical(covered)).hexdigest()
    except (TypeError, ValueError):
        digest = artifact.digest
    return text, digest


def test_a_manifest_is_read_whole_or_is_corrupt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("CRITICAL", "rlhf_core.store")  # a warning for each damaged one
    store = open_store(f"file://{tmp_path / 'store'}")

    def check(case: tuple[bytes, str]) -> None:
        data, digest = case
        key = manifest_key("model", digest)
        try:
            artifact = parse_manifest(data, key, digest)
        except ArtifactCorrupt as error:
            assert "manifest" in str(error) and len(str(error)) < 3000
            str(error).encode("utf-8", "backslashreplace")
            artifact = None
        # The list goes on without what is damaged, and an artifact read is one that can be written.
        store._backend.write(key, data)
        listed = [found.digest for found in store.list()]
        store._backend.delete(key)
        store._artifacts.clear()
        assert listed == ([digest] if artifact is not None and artifact.kind == "model" else [])
        if artifact is None:
            return
        assert artifact.digest == digest
        folded = [entry.path.casefold() for entry in artifact.files]
        assert len(set(folded)) == len(folded)
        base = tmp_path / "somewhere"
        for entry in artifact.files:
            assert (base / entry.path).resolve().is_relative_to(base)
            assert type(entry.size) is int and entry.size >= 0
        again = make_artifact(
            artifact.kind, artifact.files, artifact.metadata, artifact.parents, artifact.created
        )
        assert again.digest == digest
        assert parse_manifest(dump_manifest(again), key, digest) == again

    try_cases("manifests", manifests(), check)


def test_a_path_stays_below_its_folder_or_is_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"

    def check(path: str) -> None:
        try:
            safe = check_path(path)
        except ConfigError as error:
            assert "relative path" in str(error)
            return
        place = base / safe
        assert place.resolve().is_relative_to(base) and place != base
        assert place.relative_to(base).as_posix() == path
        assert not any(ord(char) < 32 for char in path)
        path.encode()

    try_cases("paths", st.one_of(paths, texts, st.text(max_size=30)), check)
