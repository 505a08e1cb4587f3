"""Files and folders that outlive a power cut.

A kernel keeps what was written in memory for half a minute and more. A file that was renamed to its
final name, but not synced, is there after a power cut with no bytes in it. So a file is synced
before it gets its name, and the folder afterwards, since the name is a part of the folder.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterable
from pathlib import Path

# Of file systems, network and FUSE ones for the most part, that cannot sync a file or a folder.
_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}


def sync_file(path: Path) -> None:
    """Return when the bytes of a file are on the disk. Raises OSError if they cannot get there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def sync_folders(folders: Iterable[Path]) -> None:
    """Return when the names in these folders are on the disk. Those that are gone are left out."""
    for folder in folders:
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        try:
            _sync(descriptor)
        finally:
            os.close(descriptor)


def write_whole(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a file that readers see as it was or as it is now, also after a power cut.

    Args:
        mode: of the file, without the bits of the umask.
    """
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
        sync_file(fresh)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    sync_folders([path.parent])


def sync_tree(folder: Path) -> None:
    """Return when all names below a folder, and its own, are on the disk."""
    parents = [Path(parent) for parent, _, _ in os.walk(folder)]
    sync_folders([*reversed(parents), folder.parent])


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
