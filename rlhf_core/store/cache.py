"""The artifacts' local copies: how much room they may take, and which of them go first.

cache/artifacts/<digest>     complete and verified; a name with a dot in front is neither
cache/stamps/<digest>.json   sizes and times of its files when they were verified
cache/use/<digest>.lock      locked by every process that uses it; its time is the last use
cache/locks/...              locked while a folder is being filled or removed
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from rlhf_core.store.local import free_bytes
from rlhf_core.system.home import rlhf_home

log = logging.getLogger("rlhf_core.store")

_held: dict[Path, IO[str]] = {}


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Let one process of this machine at a time work on a folder; the lock ends with it.

    False where the file system has no locks: processes may then do the work twice, and the final
    rename stays safe.
    """
    with open(_lock_file(folder), "w") as file:
        held = False
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
            held = True
        yield held


def _lock_file(folder: Path) -> Path:
    name = hashlib.sha256(os.path.abspath(folder).encode()).hexdigest()[:32]
    path = rlhf_home() / "cache" / "locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def hold(cache: Path, digest: str) -> None:
    """Note the use, and keep the artifact's folder for as long as this process lives, or one that
    it forks. To be called with the folder locked."""
    path = cache / "use" / f"{digest}.lock"
    if path not in _held:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")  # noqa: SIM115 (its lock ends with the process)
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_SH)
        _held[path] = file
    os.utime(path)


def make_room(cache: Path, needed: int, limit: float, wanted: str) -> None:
    """Remove copies that no process uses, the least recently used first, until ``needed`` bytes
    more are within ``limit`` and fit on the disk; or until all that may go are gone.

    Args:
        wanted: digest of the artifact that the room is for; what is there of it stays.
    """
    sizes = {folder: _size(folder) for folder in (cache / "artifacts").iterdir()}
    total, free = sum(sizes.values()), free_bytes(cache)
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
    """Of a copy, ``<digest>``, or of one that is being made or removed, ``.<digest>.…part``."""
    return folder.name.lstrip(".")[:64]


def _size(folder: Path) -> int:
    """Bytes of the files; those that another process removes meanwhile count as nothing."""
    total = 0
    for place, _, names in os.walk(folder):  # which passes over a folder that has gone
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(place, name)).st_size
    return total


def _last_use(cache: Path, folder: Path) -> float:
    digest = _digest(folder)
    for path in (cache / "use" / f"{digest}.lock", cache / "stamps" / f"{digest}.json", folder):
        with suppress(FileNotFoundError):
            return path.stat().st_mtime
    return 0.0


def _remove(cache: Path, folder: Path) -> bool:
    """Remove a copy unless a process fills or uses it, or there is no way to tell."""
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
        with suppress(FileNotFoundError):  # another process was first
            # Renamed first, so that nobody finds a folder from which files are missing.
            os.rename(folder, gone)
            if folder.name == digest:
                (cache / "stamps" / f"{digest}.json").unlink(missing_ok=True)
    shutil.rmtree(gone, ignore_errors=True)
    return True
