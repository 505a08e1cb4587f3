"""The backend for a local or mounted file system.

Bytes are on the disk before a file gets its name. Its name is on the disk when `write` and `create`
return; after `upload` it takes `settle`, which syncs the folders of many files at once.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_core.errors import StoreError, StoreUnavailable
from rlhf_core.store.backend import Entry
from rlhf_core.system.durable import sync_file, sync_folders

CHUNK = 8 * 2**20
TMP = ".tmp"
RESERVE = 2**18  # bytes: a collection's flag, its heartbeats, and folders for them
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


@contextmanager
def file_errors(where: Path) -> Iterator[None]:
    """Convert operating-system errors about ``where`` into StoreErrors with advice."""
    try:
        yield
    except OSError as error:
        path = error.filename2 or error.filename or where  # for a copy: its destination
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = free_bytes(where)
            raise StoreError(
                f"no space left for {path} ({free:,} bytes free); free some space or point "
                "RLHF_STORE or RLHF_HOME at a larger disk"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise StoreUnavailable(
                f"{path} cannot be used ({error.strerror}); expected a folder that this user may "
                "write to: correct its permissions, RLHF_STORE or RLHF_HOME"
            ) from error
        raise StoreError(f"file operation on {path} failed: {error.strerror or error}") from error


def hash_file(path: Path) -> str:
    """sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(where: Path) -> int:
    """Free bytes of the disk that holds ``where``, which need not exist yet."""
    for folder in (where, *where.absolute().parents):
        if folder.exists():
            return shutil.disk_usage(folder).free
    return 0


def require_space(where: Path, needed: int) -> None:
    """Raise StoreError if the disk of ``where`` has fewer than ``needed`` bytes free."""
    free = free_bytes(where)
    if free < needed:
        raise StoreError(
            f"{where} needs {needed:,} bytes, but only {free:,} are free; free some space or point "
            "RLHF_STORE or RLHF_HOME at a larger disk"
        )


def _list_names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


class LocalBackend:
    """Keys are files below ``root``; temporary files live in ``base/.tmp`` on the same disk."""

    remote = False

    def __init__(self, root: Path, base: Path | None = None) -> None:
        self.root = root
        self.base = base or root
        self.url = f"file://{root}"

    def size(self, key: str) -> int | None:
        with file_errors(self.root):
            try:
                return (self.root / key).stat().st_size
            except FileNotFoundError:
                return None

    def read(self, key: str) -> bytes | None:
        with file_errors(self.root):
            try:
                return (self.root / key).read_bytes()
            except FileNotFoundError:
                return None

    def write(self, key: str, data: bytes) -> None:
        with file_errors(self.root), self._temporary() as temporary:
            temporary.write_bytes(data)
            sync_file(temporary)
            self._move(temporary, self.root / key)
            self.settle([key])

    def create(self, key: str, data: bytes) -> bool:
        with file_errors(self.root), self._temporary() as temporary:
            temporary.write_bytes(data)
            sync_file(temporary)
            created = self._move_new(temporary, self.root / key)
            self.settle([key])
            return created

    def upload(self, source: Path, key: str, size: int, *, replace: bool) -> None:
        with file_errors(self.root), self._temporary() as temporary:
            self._reserve()
            shutil.copyfile(source, temporary, follow_symlinks=False)
            sync_file(temporary)
            if replace:
                self._move(temporary, self.root / key)
            else:
                self._move_new(temporary, self.root / key)

    def settle(self, keys: Iterable[str]) -> None:
        folders = {folder for key in keys for folder in (self.root / key).parents}
        # The innermost first: the sync of one writes what waits of the others, as a rule.
        below = [f for f in folders if f == self.base or self.base in f.parents]
        with file_errors(self.root):
            sync_folders([*sorted(below, reverse=True), self.base.parent])

    def download(self, key: str, destination: Path, size: int) -> str | None:
        with file_errors(destination):
            try:
                shutil.copyfile(self.root / key, destination)
            except FileNotFoundError:
                if (self.root / key).exists():
                    raise
                return None
            return hash_file(destination)

    def chunks(self, key: str, size: int) -> Iterator[bytes]:
        with file_errors(self.root), open(self.root / key, "rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk

    def keys(self, prefix: str) -> list[str]:
        folder, _, start = prefix.rpartition("/")
        base = self.root / folder
        keys: list[str] = []
        with file_errors(self.root):
            for name in _list_names(base):
                if not name.startswith(start) or name == TMP:
                    continue
                if (base / name).is_dir():
                    for parent, _, names in os.walk(base / name):
                        keys += [str((Path(parent) / n).relative_to(self.root)) for n in names]
                else:
                    keys.append(str((base / name).relative_to(self.root)))
        return sorted(keys)

    def entries(self, prefix: str) -> list[Entry]:
        found = []
        with file_errors(self.root):
            for key in self.keys(prefix):
                try:
                    info = (self.root / key).stat()
                except FileNotFoundError:
                    continue  # deleted since it was listed
                found.append(Entry(key, info.st_size, info.st_mtime))
        return found

    def folders(self, prefix: str) -> list[str]:
        with file_errors(self.root):
            base = self.root / prefix
            return sorted(n for n in _list_names(base) if n != TMP and (base / n).is_dir())

    def delete(self, key: str) -> None:
        target = self.root / key
        with file_errors(self.root):
            target.unlink(missing_ok=True)
            for folder in target.parents:
                # Remove empty folders; rmdir fails for the others.
                if folder == self.root or self.root not in folder.parents:
                    break
                try:
                    folder.rmdir()
                except OSError:
                    break

    def now(self) -> float:
        with file_errors(self.base):
            try:
                os.utime(self.base)  # by the server's clock, if it is a network file system
                return self.base.stat().st_mtime
            except FileNotFoundError:
                return time.time()

    def free_reserve(self) -> None:
        with file_errors(self.base):
            (self.base / TMP / "reserve").unlink(missing_ok=True)

    def _reserve(self) -> None:
        path = self.base / TMP / "reserve"
        if not path.exists():
            try:
                path.write_bytes(os.urandom(RESERVE))  # a file system could compress zeros away
            except OSError:
                path.unlink(missing_ok=True)

    def sweep(self, older_than: float) -> int:
        removed, limit = 0, time.time() - older_than
        with file_errors(self.base):
            for file in (self.base / TMP).glob("*.part"):
                try:
                    if file.stat().st_mtime < limit:
                        file.unlink()
                        removed += 1
                except FileNotFoundError:
                    continue
        return removed

    def scoped(self, prefix: str) -> LocalBackend:
        return LocalBackend(self.root / prefix, self.base)

    def with_short_timeouts(self) -> LocalBackend:
        return self

    @contextmanager
    def _temporary(self) -> Iterator[Path]:
        folder = self.base / TMP
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{uuid.uuid4().hex}.part"
        try:
            yield file
        finally:
            file.unlink(missing_ok=True)

    def _move(self, temporary: Path, target: Path) -> None:
        self._into_folder(target, lambda: os.replace(temporary, target))

    def _move_new(self, temporary: Path, target: Path) -> bool:
        try:
            self._into_folder(target, lambda: os.link(temporary, target))
            return True
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
        # Some network file systems have no hard links, but locks that end with the process.
        with open(self.base / TMP / "create.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if target.exists():
                return False
            self._move(temporary, target)
            return True

    @staticmethod
    def _into_folder(target: Path, move: Callable[[], None]) -> None:
        for last in (False, False, False, True):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                return move()
            except FileNotFoundError:
                # A concurrent delete may have removed the folder while it was empty.
                if last:
                    raise
