"""The local cache of artifacts: locks, and eviction of the least recently used copies.

cache/artifacts/<digest>     complete and verified; names with a leading dot are unfinished
cache/stamps/<digest>.json   sizes and times of its files when they were verified
cache/use/<digest>.lock      locked by every process that uses it; its mtime is the last use
cache/locks/...              locked while a folder is being filled or removed
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from rlhf_core.store.local import free_bytes, require_space
from rlhf_core.system.private import private_folder

log = logging.getLogger("rlhf_core.store")

_held: dict[Path, IO[str]] = {}


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Lock a folder against the other processes of this machine, until the block or process ends.

    Yields:
        False if the file system has no locks: two processes may then do the same work, and the
        final rename is still safe.
    """
    with open(_lock_file(folder), "w") as file:
        held = False
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
            held = True
        yield held


def _lock_file(folder: Path) -> Path:
    name = hashlib.sha256(os.path.abspath(folder).encode()).hexdigest()[:32]
    path = private_folder("cache") / "locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def mark_in_use(cache: Path, digest: str) -> None:
    """Record the use of an artifact's folder, and protect it from eviction.

    The protection lasts as long as this process or one that it forks. The caller holds the
    folder's lock.
    """
    path = cache / "use" / f"{digest}.lock"
    if path not in _held:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")  # noqa: SIM115 (its lock ends with the process)
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_SH)
        _held[path] = file
    os.utime(path)


def evict(cache: Path, needed: int, limit: float, wanted: str, confirm: Callable[[], None]) -> None:
    """Remove unused copies, the least recently used first, to make room for a new one.

    It stops when ``needed`` more bytes are within the limit and fit on the disk, or when only
    copies in use are left.

    Args:
        needed: bytes of the new copy.
        limit: bytes that the cache may take.
        wanted: digest of the new copy; its unfinished files stay.
        confirm: is called before the first copy goes, and raises if the new one cannot come.

    Raises:
        StoreError: the disk has no room for the new copy, even without all others.
    """
    sizes = {folder: _size(folder) for folder in (cache / "artifacts").iterdir()}
    total, free = sum(sizes.values()), free_bytes(cache)
    if total + needed <= limit and free >= needed:
        return
    require_space(cache, needed - total)
    confirm()
    for folder in sorted(sizes, key=lambda each: _last_use(cache, each)):
        if total + needed <= limit and free >= needed:
            return
        if _digest(folder) != wanted and _remove(cache, folder):
            log.info("removed %s from the cache (%d bytes)", _digest(folder)[:12], sizes[folder])
            total -= sizes[folder]
            free += sizes[folder]
    if total + needed > limit:
        log.warning(
            "the cache %s will hold %d bytes, which is more than RLHF_STORE_CACHE_GB allows "
            "(%d): all of it is in use", cache, total + needed, limit,
        )  # fmt: skip


def _digest(folder: Path) -> str:
    """The digest of a copy, ``<digest>``, or of an unfinished one, ``.<digest>.…part``."""
    return folder.name.lstrip(".")[:64]


def _size(folder: Path) -> int:
    """Bytes of the files in a folder; files that another process removes meanwhile count as 0."""
    total = 0
    for parent, _, names in os.walk(folder):  # yields nothing for a missing folder
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def _last_use(cache: Path, folder: Path) -> float:
    digest = _digest(folder)
    for path in (cache / "use" / f"{digest}.lock", cache / "stamps" / f"{digest}.json", folder):
        with suppress(FileNotFoundError):
            return path.stat().st_mtime
    return 0.0


def _remove(cache: Path, folder: Path) -> bool:
    """Remove a copy unless a process fills or uses it, or the file system has no locks."""
    digest = _digest(folder)
    use = cache / "use" / f"{digest}.lock"
    use.parent.mkdir(parents=True, exist_ok=True)
    gone = folder.with_name(f".{digest}.{uuid.uuid4().hex}.part")
    with open(_lock_file(cache / "artifacts" / digest), "w") as filling, open(use, "a") as using:
        try:
            fcntl.flock(filling, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(using, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        with suppress(FileNotFoundError):  # another process was faster
            # Renamed before it is deleted, so that nobody sees a folder with missing files.
            os.rename(folder, gone)
            if folder.name == digest:
                (cache / "stamps" / f"{digest}.json").unlink(missing_ok=True)
    shutil.rmtree(gone, ignore_errors=True)
    return True
