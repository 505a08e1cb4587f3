"""Local folders: lists the files to publish, and fetches artifacts into verified folders."""

from __future__ import annotations

import json
import os
import shutil
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_core.errors import ArtifactCorrupt, ConfigError
from rlhf_core.store.artifact import Artifact, FileEntry, check_path
from rlhf_core.store.backend import Backend
from rlhf_core.store.blobs import download_blob, remove_parts
from rlhf_core.store.cache import evict, locked, mark_in_use
from rlhf_core.store.local import file_errors, hash_file, require_space
from rlhf_core.store.parallel import FILES_AT_ONCE, in_parallel
from rlhf_core.store.publishing import check_complete
from rlhf_core.store.settings import read_settings
from rlhf_core.system.durable import sync_folders, sync_tree, write_whole
from rlhf_core.system.home import rlhf_home


def walk(folder: Path) -> dict[str, Path]:
    """All files below a folder by their relative posix path.

    Raises:
        ConfigError: the folder does not exist, is empty, or holds a symbolic link.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; expected one with the artifact's files")
    found: dict[str, Path] = {}
    with file_errors(folder):
        for parent, folders, names in os.walk(folder, onerror=_reraise):
            for name in [*folders, *names]:
                path = Path(parent) / name
                if path.is_symlink():
                    raise ConfigError(
                        f"{path} is a symbolic link; an artifact holds regular files only: copy "
                        "its target (cp -rL) first"
                    )
            for name in names:
                path = Path(parent) / name
                found[check_path(path.relative_to(folder).as_posix())] = path
    if not found:
        raise ConfigError(f"{folder} holds no files; there is nothing to publish")
    return found


def _reraise(error: OSError) -> None:
    raise error


def fetch_cached(backend: Backend, artifact: Artifact) -> Path:
    """The artifact's folder in the local cache, complete and verified.

    An existing folder is read again only if a file's size or time has changed since it was
    verified; changed files are replaced. The folder stays as long as this process lives. To make
    room for a new one, unused folders may be evicted (RLHF_STORE_CACHE_GB).
    """
    cache = rlhf_home() / "cache"
    folder = cache / "artifacts" / artifact.digest
    stamps_file = cache / "stamps" / f"{artifact.digest}.json"
    with file_errors(cache), locked(folder) as alone:
        for parent in (folder.parent, stamps_file.parent):
            parent.mkdir(parents=True, exist_ok=True)
        mark_in_use(cache, artifact.digest)
        stamps = _read_stamps(stamps_file)
        if folder.is_dir() and all(_is_verified(folder, e, stamps) for e in artifact.files):
            return folder
        limit = read_settings().cache_gb * 1e9
        evict(
            cache, artifact.size, limit, artifact.digest, lambda: check_complete(backend, artifact)
        )
        if folder.is_dir():
            _fill(backend, artifact, folder, stamps)
        else:
            # One name per machine, so that a fetch continues where a killed one stopped.
            owner = socket.gethostname() if alone else uuid.uuid4().hex
            part = folder.with_name(f".{artifact.digest}.{owner}.part")
            try:
                _fill(backend, artifact, part, {})
            except ArtifactCorrupt:
                shutil.rmtree(part, ignore_errors=True)
                raise
            _move(part, folder, artifact)
        _write_stamps(stamps_file, folder, artifact)
        return folder


def fetch_to(backend: Backend, artifact: Artifact, destination: Path) -> Path:
    """Fetch the artifact into ``destination``. Raises ConfigError if that holds other files."""
    with file_errors(destination), locked(destination):
        if _contains(destination, artifact):
            return destination
        if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
            raise ConfigError(
                f"{destination} exists and is not artifact {artifact.ref}; name a new or empty "
                "folder, or remove it"
            )
        destination.absolute().parent.mkdir(parents=True, exist_ok=True)
        part = destination.absolute().with_name(f".{destination.name}.{uuid.uuid4().hex}.part")
        try:
            _fill(backend, artifact, part, {})
            _move(part, destination, artifact)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return destination


def _fill(backend: Backend, artifact: Artifact, folder: Path, stamps: Mapping[str, Any]) -> None:
    """Download the files that are missing or not verified."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_parts(folder, {entry.path for entry in artifact.files})
    todo = [e for e in artifact.files if not _is_verified(folder, e, stamps, rehash=True)]
    require_space(folder, sum(entry.size for entry in todo))

    def fetch(entry: FileEntry) -> None:
        download_blob(backend, entry, folder / entry.path, artifact.ref)

    in_parallel(fetch, todo, FILES_AT_ONCE)
    sync_tree(folder)


def _move(part: Path, folder: Path, artifact: Artifact) -> None:
    try:
        os.rename(part, folder)
        sync_folders([folder.parent])
    except OSError:
        # Without working locks another process may have been faster.
        if not _contains(folder, artifact):
            raise
        shutil.rmtree(part, ignore_errors=True)


def _contains(folder: Path, artifact: Artifact) -> bool:
    """Whether a folder holds exactly the artifact's files, verified by their sha256."""
    if not folder.is_dir() or not artifact.files:
        return False
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}
    return there == {e.path for e in artifact.files} and all(
        _is_verified(folder, entry, {}, rehash=True) for entry in artifact.files
    )


def _is_verified(
    folder: Path, entry: FileEntry, stamps: Mapping[str, Any], rehash: bool = False
) -> bool:
    """Whether a file is unchanged since it was verified, or (``rehash``) verifies now."""
    path = folder / entry.path
    try:
        info = path.lstat()
        if path.is_symlink() or not path.is_file() or info.st_size != entry.size:
            return False
        if stamps.get(entry.path) == [info.st_size, info.st_mtime_ns]:
            return True
        return rehash and hash_file(path) == entry.sha256
    except OSError:
        return False


def _read_stamps(path: Path) -> dict[str, Any]:
    try:
        stamps = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return stamps if isinstance(stamps, dict) else {}


def _write_stamps(path: Path, folder: Path, artifact: Artifact) -> None:
    stamps = {}
    for entry in artifact.files:
        info = (folder / entry.path).stat()
        stamps[entry.path] = [info.st_size, info.st_mtime_ns]
    write_whole(path, json.dumps(stamps).encode())
