"""Checks stored bytes, and that the storage can be used."""

from __future__ import annotations

import hashlib
import uuid

from rlhf_core.errors import StoreUnavailable
from rlhf_core.store.artifact import Artifact, FileEntry
from rlhf_core.store.backend import Backend
from rlhf_core.store.blobs import (
    DOWNLOAD_TRIES,
    blob_key,
    blob_problem,
    check_blob,
    corrupt_error,
)
from rlhf_core.store.parallel import FILES_AT_ONCE, in_parallel


def read_verified(backend: Backend, artifact: Artifact, path: str) -> bytes:
    """See `Store.read_bytes`."""
    entry = artifact.file(path)
    found = ""
    for _ in range(DOWNLOAD_TRIES if backend.remote else 1):
        data = backend.read(blob_key(entry.sha256))
        if data is None:
            found = "the blob is missing"
            continue
        found = blob_problem(entry, len(data), hashlib.sha256(data).hexdigest())
        if not found:
            return data
    raise corrupt_error(backend, entry, found, artifact.ref)


def verify(backend: Backend, artifact: Artifact) -> list[str]:
    """See `Store.verify`."""

    def check(entry: FileEntry) -> str:
        found = check_blob(backend, entry)
        return found and str(corrupt_error(backend, entry, found, artifact.ref))

    return [text for text in in_parallel(check, artifact.files, FILES_AT_ONCE) if text]


def check_access(backend: Backend) -> None:
    """See `Store.check`."""
    key, data = f"probes/{uuid.uuid4().hex}", b"rlhf"
    created = backend.create(key, data)  # if this fails, there is nothing to remove
    try:
        again = backend.create(key, b"second")
        if not created or again or backend.read(key) != data:
            raise StoreUnavailable(
                f"{backend.url} does not keep the first writer's value (it ignores If-None-Match, "
                "or reads are stale); expected a store with conditional writes, such as AWS S3, "
                "MinIO, Ceph or SeaweedFS"
            )
        backend.keys("probes/")
    finally:
        backend.delete(key)
