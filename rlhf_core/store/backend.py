"""What the store needs of a place that keeps bytes under keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Entry:
    """One value: its key, bytes, and when it was written (seconds since 1970, by the clock of the
    place)."""

    key: str
    size: int
    modified: float


class Backend(Protocol):
    """Keys are relative posix paths. Every write is atomic: a reader sees all of it or nothing.

    All methods raise StoreError or StoreUnavailable, with a message for people, and are safe to
    call from several threads and, after a fork, from the child.
    """

    url: str
    remote: bool
    """True when bytes travel over a network, so that a corrupt download is worth repeating."""

    def size(self, key: str) -> int | None:
        """Bytes under the key, or None when there is nothing."""

    def read(self, key: str) -> bytes | None:
        """The whole value, or None when there is nothing."""

    def write(self, key: str, data: bytes) -> None:
        """Put a value, replacing what was there."""

    def create(self, key: str, data: bytes) -> bool:
        """Put a value if there is none; exactly one of several racing callers gets True."""

    def upload(self, source: Path, key: str, size: int, *, replace: bool) -> None:
        """Put a file of ``size`` bytes. With ``replace=False`` a value that came first stays."""

    def download(self, key: str, destination: Path, size: int) -> str | None:
        """Write the value into a file (not atomic, not compared with anything); the sha256 of what
        is in the file then, in hex, or None when there is nothing under the key."""

    def chunks(self, key: str, size: int) -> Iterator[bytes]:
        """The value in order, in pieces of some MiB; ends early where the value does."""

    def keys(self, prefix: str) -> list[str]:
        """All keys that start with the prefix (a string, not a folder), sorted."""

    def entries(self, prefix: str) -> list[Entry]:
        """As ``keys``, with size and time."""

    def folders(self, prefix: str) -> list[str]:
        """Names directly below the folder ``prefix`` that may have keys below them, sorted."""

    def delete(self, key: str) -> None:
        """Remove a value; nothing happens when there is none."""

    def sweep(self, older_than: float) -> int:
        """Remove what killed writers left more than so many seconds ago; how many it was."""

    def within(self, prefix: str) -> Backend:
        """The same place, seen from below a prefix."""

    def impatient(self) -> Backend:
        """The same place with short time limits and no retries, for a preflight."""
