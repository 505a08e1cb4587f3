"""The interface of a storage backend: bytes under keys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Entry:
    """A listed value.

    Attributes:
        size: in bytes.
        modified: when it was written, in seconds since 1970 by the backend's clock.
    """

    key: str
    size: int
    modified: float


class Backend(Protocol):
    """A key-value store. Keys are relative posix paths. Every write is atomic, and what `write` and
    `create` have written outlives a power cut.

    All methods raise StoreError or StoreUnavailable. They may be called from several threads and,
    after a fork, from the child.
    """

    url: str
    remote: bool
    """True if the bytes come over a network, so that a corrupt download should be retried."""

    def size(self, key: str) -> int | None:
        """Size of the value in bytes; None if there is no such key."""

    def read(self, key: str) -> bytes | None:
        """The whole value; None if there is no such key."""

    def write(self, key: str, data: bytes) -> None:
        """Write a value, replacing an existing one."""

    def create(self, key: str, data: bytes) -> bool:
        """Write a value unless the key exists; exactly one of several racing callers gets True."""

    def upload(self, source: Path, key: str, size: int, *, replace: bool) -> None:
        """Write a file of ``size`` bytes. With ``replace=False`` an existing value stays.

        Call `settle` before anything refers to it.
        """

    def settle(self, keys: Iterable[str]) -> None:
        """Return when uploads to these keys, and deletions of them, outlive a power cut."""

    def download(self, key: str, destination: Path, size: int) -> str | None:
        """Copy the value into a file, which is not atomic.

        Returns:
            The sha256 of the file, in hex; None if there is no such key. It is not verified.
        """

    def chunks(self, key: str, size: int) -> Iterator[bytes]:
        """The value in order, in chunks of some MiB; stops early if the value is shorter."""

    def keys(self, prefix: str) -> list[str]:
        """All keys that start with the string ``prefix``, sorted."""

    def entries(self, prefix: str) -> list[Entry]:
        """As `keys`, with size and time."""

    def folders(self, prefix: str) -> list[str]:
        """Names of the folders directly below the folder ``prefix``, sorted."""

    def delete(self, key: str) -> None:
        """Remove a value, if there is one."""

    def now(self) -> float:
        """The backend's time in seconds since 1970, by the clock of `Entry.modified`. It writes
        nothing, since the storage may be full."""

    def free_reserve(self) -> None:
        """Free the little space that is kept for a collection of a full disk. The next upload takes
        it again."""

    def sweep(self, older_than: float) -> int:
        """Remove unfinished uploads older than so many seconds; returns their number."""

    def scoped(self, prefix: str) -> Backend:
        """The same storage with all keys below a prefix."""

    def with_short_timeouts(self) -> Backend:
        """The same storage with short timeouts and few retries, for a preflight."""
