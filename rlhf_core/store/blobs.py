"""Blobs: files by their content. Uploads that skip what is there, downloads that are verified."""

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

DOWNLOAD_TRIES = 3
_PART = re.compile(r"\.[0-9a-f]{32}\.part")


def blob_key(sha256: str) -> str:
    return f"blobs/sha256/{sha256[:2]}/{sha256}"


@dataclass(frozen=True)
class Source:
    """Bytes that go into the store: a file, or a value in memory."""

    entry: FileEntry
    content: Path | bytes
    stamp: tuple[int, int] = (0, 0)


def read_source(path: str, content: Path | bytes) -> Source:
    """Hash a file or value. Raises ConfigError for a link or anything but a plain file."""
    if isinstance(content, bytes):
        return Source(FileEntry(path, len(content), hashlib.sha256(content).hexdigest()), content)
    if content.is_symlink():
        raise ConfigError(
            f"{content} is a symbolic link; an artifact holds plain files only: copy what it "
            "points to (cp -L) first"
        )
    if not content.is_file():
        raise ConfigError(f"{content} is not a plain file; an artifact holds plain files only")
    with file_errors(content):
        stamp = _stamp(content)
        return Source(FileEntry(path, stamp[0], hash_file(content)), content, stamp)


def _stamp(path: Path) -> tuple[int, int]:
    info = path.stat()
    return info.st_size, info.st_mtime_ns


def upload_blob(backend: Backend, source: Source, *, force: bool = False) -> int:
    """Put a source unless a blob of its size is there; bytes sent.

    Raises StoreError when the file changed while it was read: its blob is then removed.
    """
    entry, key = source.entry, blob_key(source.entry.sha256)
    found = backend.size(key)
    if found == entry.size and not force:
        return 0
    # A blob of another size is what something outside this code left; the right bytes replace it.
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
    """Write a verified file, atomically. Raises ArtifactCorrupt; ``target`` is then not there.

    ``owner`` names the artifact in the message.
    """
    part = target.with_name(f".{uuid.uuid4().hex}.part")  # as remove_parts looks for it
    found = "the blob is missing"
    try:
        with file_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            for _ in range(DOWNLOAD_TRIES if backend.remote else 1):
                sha256 = backend.download(blob_key(entry.sha256), part, entry.size)
                if sha256 is not None:
                    found = compare(entry, part.stat().st_size, sha256)
                    if not found:
                        os.replace(part, target)
                        return
    finally:
        part.unlink(missing_ok=True)
    raise corrupt(backend, entry, found, owner)


def remove_parts(folder: Path, keep: Set[str]) -> None:
    """Remove what killed downloads left below a folder, but no file of the artifact itself."""
    for path in folder.rglob(".*.part"):
        if _PART.fullmatch(path.name) and path.relative_to(folder).as_posix() not in keep:
            path.unlink()


def check_blob(backend: Backend, entry: FileEntry) -> str:
    """Read a blob to its end; what is wrong with it, or ''."""
    key = blob_key(entry.sha256)
    size = backend.size(key)
    if size is None:
        return "the blob is missing"
    digest = hashlib.sha256()
    for chunk in backend.chunks(key, size):
        digest.update(chunk)
    return compare(entry, size, digest.hexdigest())


def compare(entry: FileEntry, size: int, sha256: str) -> str:
    """What is wrong with bytes of this size and hash, or ''."""
    if size != entry.size:
        return f"it has {size:,} bytes instead of {entry.size:,}"
    if sha256 != entry.sha256:
        return f"its sha256 is {sha256[:12]}… instead of {entry.sha256[:12]}…"
    return ""


def corrupt(backend: Backend, entry: FileEntry, found: str, owner: str) -> ArtifactCorrupt:
    return ArtifactCorrupt(
        f"file {entry.path!r} of artifact {owner} is damaged in {backend.url} "
        f"({blob_key(entry.sha256)}): {found}; repair it from a good copy (Store.repair), or "
        "delete the artifact and make it again"
    )
