"""Blobs: files named by their sha256. Uploads skip existing blobs, downloads are verified."""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

from rlhf_core.errors import ArtifactCorrupt, ConfigError, StoreError
from rlhf_core.store.artifact import FileEntry
from rlhf_core.store.backend import Backend
from rlhf_core.store.local import file_errors, hash_file
from rlhf_core.system.durable import sync_file

DOWNLOAD_TRIES = 3
_PART = re.compile(r"\.[0-9a-f]{32}\.part")


def blob_key(sha256: str) -> str:
    """The key of a blob."""
    return f"blobs/sha256/{sha256[:2]}/{sha256}"


@dataclass(frozen=True)
class Source:
    """Content to publish: a file or bytes.

    Attributes:
        stamp: size in bytes and mtime in ns of the file when it was hashed.
    """

    entry: FileEntry
    content: Path | bytes
    stamp: tuple[int, int] = (0, 0)


def read_source(path: str, content: Path | bytes) -> Source:
    """Hash a file or bytes. Raises ConfigError for anything but a regular file."""
    if isinstance(content, bytes):
        return Source(FileEntry(path, len(content), hashlib.sha256(content).hexdigest()), content)
    if content.is_symlink():
        raise ConfigError(
            f"{content} is a symbolic link; an artifact holds regular files only: copy its target "
            "(cp -L) first"
        )
    if not content.is_file():
        raise ConfigError(f"{content} is not a regular file; an artifact holds regular files only")
    with file_errors(content):
        stamp = _stamp(content)
        return Source(FileEntry(path, stamp[0], hash_file(content)), content, stamp)


def _stamp(path: Path) -> tuple[int, int]:
    info = path.stat()
    return info.st_size, info.st_mtime_ns


def upload_blob(backend: Backend, source: Source, *, force: bool = False) -> int:
    """Upload a source unless a blob of its size exists.

    Args:
        force: upload it even then.

    Returns:
        Number of bytes sent.

    Raises:
        StoreError: the file changed while it was read; its blob is removed again.
    """
    entry, key = source.entry, blob_key(source.entry.sha256)
    found = backend.size(key)
    if found == entry.size and not force:
        return 0
    # A blob of another size was not written by this code; replace it with the right bytes.
    replace = force or found is not None
    if isinstance(source.content, bytes):
        if replace:
            backend.write(key, source.content)
        else:
            backend.create(key, source.content)
        return entry.size
    backend.upload(source.content, key, entry.size, replace=replace)
    with file_errors(source.content):
        if _stamp(source.content) != source.stamp:
            backend.delete(key)
            raise StoreError(
                f"{source.content} changed while it was being published; publish again when "
                "nothing writes to it"
            )
    return entry.size


def download_blob(backend: Backend, entry: FileEntry, target: Path, owner: str) -> None:
    """Download and verify a blob into a file, atomically.

    Args:
        owner: names the artifact in the error.

    Raises:
        ArtifactCorrupt: the blob is missing or damaged; ``target`` does not exist then.
    """
    part = target.with_name(f".{uuid.uuid4().hex}.part")  # as remove_parts looks for it
    found = "the blob is missing"
    try:
        with file_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            for _ in range(DOWNLOAD_TRIES if backend.remote else 1):
                sha256 = backend.download(blob_key(entry.sha256), part, entry.size)
                if sha256 is not None:
                    found = blob_problem(entry, part.stat().st_size, sha256)
                    if not found:
                        sync_file(part)
                        os.replace(part, target)
                        return
    finally:
        part.unlink(missing_ok=True)
    raise corrupt_error(backend, entry, found, owner)


def remove_parts(folder: Path, keep: Set[str]) -> None:
    """Remove the temporary files of killed downloads below a folder, except paths in ``keep``."""
    for path in folder.rglob(".*.part"):
        if _PART.fullmatch(path.name) and path.relative_to(folder).as_posix() not in keep:
            path.unlink()


def check_blob(backend: Backend, entry: FileEntry) -> str:
    """Read a blob to its end; returns what is wrong with it, or ''."""
    key = blob_key(entry.sha256)
    size = backend.size(key)
    if size is None:
        return "the blob is missing"
    digest = hashlib.sha256()
    for chunk in backend.chunks(key, size):
        digest.update(chunk)
    return blob_problem(entry, size, digest.hexdigest())


def blob_problem(entry: FileEntry, size: int, sha256: str) -> str:
    """What is wrong with a blob of this size (bytes) and hash, or ''."""
    if size != entry.size:
        return f"it has {size:,} bytes instead of {entry.size:,}"
    if sha256 != entry.sha256:
        return f"its sha256 is {sha256[:12]}… instead of {entry.sha256[:12]}…"
    return ""


def corrupt_error(backend: Backend, entry: FileEntry, found: str, owner: str) -> ArtifactCorrupt:
    """The error for a damaged file of the artifact ``owner``."""
    return ArtifactCorrupt(
        f"file {entry.path!r} of artifact {owner} is damaged in {backend.url} "
        f"({blob_key(entry.sha256)}): {found}; `rlhf artifacts repair` looks for a good copy, "
        "and otherwise clears it away, so that its stage runs again"
    )
