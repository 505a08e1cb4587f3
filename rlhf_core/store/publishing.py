"""Publishes an artifact: hash the files, upload new blobs, check them, write the manifest."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_core.errors import ArtifactCorrupt, ArtifactNotFound, StoreError
from rlhf_core.store.artifact import (
    Artifact,
    FileEntry,
    check_kind,
    check_path,
    dump_manifest,
    make_artifact,
    parse_manifest,
)
from rlhf_core.store.backend import Backend
from rlhf_core.store.blobs import Source, blob_key, read_source, upload_blob
from rlhf_core.store.leases import lease
from rlhf_core.store.parallel import FILES_AT_ONCE, REQUESTS_AT_ONCE, in_parallel
from rlhf_core.store.refs import manifest_key

log = logging.getLogger("rlhf_core.store")


def publish(
    backend: Backend,
    kind: str,
    files: Mapping[str, Path | FileEntry | bytes],
    metadata: Mapping[str, Any] | None,
    parents: Sequence[str],
) -> Artifact:
    """See `Store.publish_derived`. A kill leaves unused blobs, but never a broken artifact."""
    began = time.monotonic()
    check_kind(kind)
    fresh: list[tuple[str, Path | bytes]] = []
    entries: list[FileEntry] = []
    for path, content in files.items():
        check_path(path)
        if isinstance(content, FileEntry):
            entries.append(FileEntry(path, content.size, content.sha256))
        else:
            fresh.append((path, content))
    sources = in_parallel(lambda item: read_source(*item), fresh, FILES_AT_ONCE)
    entries += [source.entry for source in sources]
    artifact = make_artifact(kind, entries, metadata, parents)

    distinct: dict[str, Source] = {source.entry.sha256: source for source in sources}
    sent = in_parallel(
        lambda source: upload_blob(backend, source), distinct.values(), FILES_AT_ONCE
    )
    # Reused blobs may be old, and about to be collected.
    reused = len({entry.sha256 for entry in entries}) > sum(n > 0 for n in sent)
    published = None if reused else _commit_new(backend, artifact)
    if published is None:
        with lease(backend, artifact):
            sent += in_parallel(
                lambda source: upload_blob(backend, source), distinct.values(), FILES_AT_ONCE
            )
            published = _commit_new(backend, artifact) or _renew(backend, artifact)
    log.info(
        "published %s (%d files, %d bytes; sent %d files, %d bytes) in %.1f s",
        published.ref, len(entries), artifact.size, sum(n > 0 for n in sent), sum(sent),
        time.monotonic() - began,
    )  # fmt: skip
    return published


def upload(backend: Backend, files: Mapping[str, Path | bytes]) -> list[FileEntry]:
    """See `Store.upload`."""
    sources = in_parallel(lambda item: read_source(*item), files.items(), FILES_AT_ONCE)
    in_parallel(lambda source: upload_blob(backend, source), sources, FILES_AT_ONCE)
    backend.settle(blob_key(source.entry.sha256) for source in sources)
    return [source.entry for source in sources]


@contextmanager
def holding(backend: Backend, artifact: Artifact) -> Iterator[Artifact]:
    """See `Store.holding`."""
    with lease(backend, artifact):
        if backend.size(manifest_key(artifact.kind, artifact.digest)) is None:
            raise ArtifactNotFound(f"artifact {artifact.ref} is not in {backend.url} any more")
        check_complete(backend, artifact)
        yield artifact


def check_complete(backend: Backend, artifact: Artifact) -> None:
    """Raise ArtifactCorrupt unless every blob is there and has the size that the manifest says."""
    if missing := incomplete(backend, artifact):
        raise ArtifactCorrupt(
            f"{artifact.ref} in {backend.url} has lost files: {'; '.join(missing)}; "
            "`rlhf artifacts repair` looks for copies of them"
        )


def incomplete(backend: Backend, artifact: Artifact) -> list[str]:
    """One text for each file whose blob is missing or has the wrong size."""

    def check(entry: FileEntry) -> str:
        size = backend.size(blob_key(entry.sha256))
        if size == entry.size:
            return ""
        found = "no blob" if size is None else f"a blob of {size:,} bytes"
        return f"{entry.path} ({entry.size:,} bytes) has {found}"

    distinct = {entry.sha256: entry for entry in artifact.files}
    return [text for text in in_parallel(check, distinct.values(), REQUESTS_AT_ONCE) if text]


def _commit_new(backend: Backend, artifact: Artifact) -> Artifact | None:
    """Write the manifest; None if it exists already. Raises StoreError if a blob is missing."""
    if missing := incomplete(backend, artifact):
        raise StoreError(
            f"{backend.url} lacks files of the {artifact.kind} to publish: "
            + "; ".join(missing)
            + "; publish again, and take entries only from artifacts of this store"
        )
    # Those of other writers too: one may have uploaded a file and not have settled it yet.
    backend.settle(blob_key(entry.sha256) for entry in artifact.files)
    key = manifest_key(artifact.kind, artifact.digest)
    return artifact if backend.create(key, dump_manifest(artifact)) else None


def _renew(backend: Backend, artifact: Artifact) -> Artifact:
    """The artifact that was published earlier, rewritten so that a collector sees it as new. A
    damaged manifest is replaced.
    """
    key = manifest_key(artifact.kind, artifact.digest)
    data = backend.read(key) or dump_manifest(artifact)
    try:
        earlier = parse_manifest(data, key, artifact.digest)
    except ArtifactCorrupt as error:
        log.warning("replaced: %s", error)
        earlier, data = artifact, dump_manifest(artifact)
    backend.write(key, data)
    return earlier
