"""Folders on this machine: reading one to publish it, and filling one with verified files."""

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
from rlhf_core.store.cache import hold, locked, make_room
from rlhf_core.store.local import file_errors, hash_file, require_space
from rlhf_core.store.parallel import FILES_AT_ONCE, in_parallel
from rlhf_core.store.settings import read_settings
from rlhf_core.system.home import rlhf_home


def walk(folder: Path) -> dict[str, Path]:
    """All files below a folder by their posix path. Raises ConfigError for links and no files."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; a folder with the artifact's files is needed")
    found: dict[str, Path] = {}
    with file_errors(folder):
        for parent, folders, names in os.walk(folder, onerror=_raise):
            for name in [*folders, *names]:
                path = Path(parent) / name
                if path.is_symlink():
                    raise ConfigError(
                        f"{path} is a symbolic link; an artifact holds plain files only: copy "
                        "what it points to (cp -rL) first"
                    )
            for name in names:
                path = Path(parent) / name
                found[check_path(path.relative_to(folder).as_posix())] = path
    if not found:
        raise ConfigError(f"{folder} holds no files; there is nothing to publish")
    return found


def _raise(error: OSError) -> None:
    raise error


def fetch_cached(backend: Backend, artifact: Artifact) -> Path:
    """The artifact's folder in the local cache, complete and verified.

    A folder that is there is not read again unless a file's size or time has changed since it was
    verified; a file that was changed is replaced. It stays for as long as this process lives; for a
    new one, others that nobody uses may have to go (RLHF_STORE_CACHE_GB).
    """
    cache = rlhf_home() / "cache"
    folder = cache / "artifacts" / artifact.digest
    stamps = cache / "stamps" / f"{artifact.digest}.json"
    with file_errors(cache), locked(folder) as alone:
        for place in (folder.parent, stamps.parent):
            place.mkdir(parents=True, exist_ok=True)
        hold(cache, artifact.digest)
        known = _read_stamps(stamps)
        if folder.is_dir() and all(_is_as(folder, e, known) for e in artifact.files):
            return folder
        limit = read_settings().cache_gb * 1e9
        make_room(cache, artifact.size, limit, artifact.digest)
        if folder.is_dir():
            _fill(backend, artifact, folder, known)
        else:
            # One name per machine: the next fetch goes on from what a killed one had verified.
            owner = socket.gethostname() if alone else uuid.uuid4().hex
            part = folder.with_name(f".{artifact.digest}.{owner}.part")
            try:
                _fill(backend, artifact, part, {})
            except ArtifactCorrupt:
                shutil.rmtree(part, ignore_errors=True)
                raise
            _move(part, folder, artifact)
        _write_stamps(stamps, folder, artifact)
        return folder


def fetch_to(backend: Backend, artifact: Artifact, destination: Path) -> Path:
    """Make ``destination`` the artifact's folder. Raises ConfigError when it holds other files."""
    with file_errors(destination), locked(destination):
        if _holds(destination, artifact):
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


def _fill(backend: Backend, artifact: Artifact, folder: Path, known: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    remove_parts(folder, {entry.path for entry in artifact.files})
    todo = [e for e in artifact.files if not _is_as(folder, e, known, rehash=True)]
    require_space(folder, sum(entry.size for entry in todo))

    def fetch(entry: FileEntry) -> None:
        download_blob(backend, entry, folder / entry.path, artifact.ref)

    in_parallel(fetch, todo, FILES_AT_ONCE)


def _move(part: Path, folder: Path, artifact: Artifact) -> None:
    try:
        os.rename(part, folder)
    except OSError:
        # On a file system whose locks do not hold, another process may have been first.
        if not _holds(folder, artifact):
            raise
        shutil.rmtree(part, ignore_errors=True)


def _holds(folder: Path, artifact: Artifact) -> bool:
    if not folder.is_dir() or not artifact.files:
        return False
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}
    return there == {e.path for e in artifact.files} and all(
        _is_as(folder, entry, {}, rehash=True) for entry in artifact.files
    )


def _is_as(folder: Path, entry: FileEntry, known: Mapping[str, Any], rehash: bool = False) -> bool:
    """True when the file is as it was when last verified, or (``rehash``) verifies now."""
    path = folder / entry.path
    try:
        info = path.lstat()
        if path.is_symlink() or not path.is_file() or info.st_size != entry.size:
            return False
        if known.get(entry.path) == [info.st_size, info.st_mtime_ns]:
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
    temporary = path.with_name(f".{uuid.uuid4().hex}.part")
    temporary.write_text(json.dumps(stamps))
    os.replace(temporary, path)
