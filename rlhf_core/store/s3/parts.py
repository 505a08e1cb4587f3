"""Parts of files in transfer: read for an upload, written by a download, hashed on arrival.

Each part holds at most one block in memory.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_core.store.parallel import in_parallel

BLOCK = 2**18
SLOWEST = 128 * 2**10  # bytes per second; a slower part counts as stalled


def md5(data: bytes) -> str:
    """Content-MD5 of bytes, the only checksum that every S3 server verifies, for parts too."""
    return b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


class FileSlice:
    """Part of an open file as a request body, which can be sent again.

    The socket's timeout detects a stalled peer. A time limit for the whole part detects one that
    accepts a byte now and then.

    Args:
        start, size: in bytes.
        patience: seconds added to the part's time on the slowest link.
    """

    def __init__(self, descriptor: int, start: int, size: int, patience: float) -> None:
        self._descriptor, self._start, self._size = descriptor, start, size
        self._limit = patience + size / SLOWEST
        self._position = 0
        self._deadline = 0.0

    def __len__(self) -> int:
        return self._size

    def read(self, count: int = -1) -> bytes:
        """The next bytes. Raises TimeoutError after the part's time limit."""
        if self._position == 0:
            self._deadline = time.monotonic() + self._limit
        elif time.monotonic() > self._deadline:
            raise TimeoutError("the part was not sent in time")
        # More than requested: http.client reads 16 KiB at a time, which costs much CPU time.
        wanted = min(max(count, BLOCK), self._size - self._position)
        data = os.pread(self._descriptor, wanted, self._start + self._position)
        self._position += len(data)
        return data

    def tell(self) -> int:
        """The position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the position; returns it."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def md5(self) -> str:
        """Content-MD5 of the slice."""
        digest = hashlib.md5(usedforsecurity=False)
        for start in range(self._start, self._start + self._size, BLOCK):
            end = min(start + BLOCK, self._start + self._size)
            digest.update(os.pread(self._descriptor, end - start, start))
        return b64encode(digest.digest()).decode()


class FileRegion:
    """Part of an open file as the destination of a reply: at most ``size`` bytes from ``start``.

    Attributes:
        failure: the file system's error that ended a try; None: there was none.
    """

    def __init__(self, descriptor: int, start: int, size: int, patience: float) -> None:
        self._descriptor, self._start, self._size = descriptor, start, size
        self._limit = patience + size / SLOWEST
        self.failure: OSError | None = None

    def fill(self, body: Any) -> int:
        """Write a reply's body; returns the number of bytes written.

        A longer body is cut and a shorter one leaves zeros; the sha256 detects both.

        Raises:
            TimeoutError: the body did not arrive in time.
            OSError: the file system failed.
        """
        done, deadline = 0, time.monotonic() + self._limit
        while done < self._size and (data := body.read(BLOCK)):
            data = data[: self._size - done]
            try:
                os.pwrite(self._descriptor, data, self._start + done)
            except OSError as error:
                self.failure = error
                raise
            done += len(data)
            if time.monotonic() > deadline:
                raise TimeoutError("the part did not arrive in time")
        return done


class PartHasher:
    """The sha256 of a file whose parts arrive in any order.

    A part is read back from the file and hashed as soon as all earlier ones have arrived, by the
    thread that completed them.
    """

    def __init__(self, descriptor: int, size: int, step: int) -> None:
        self._descriptor, self._size, self._step = descriptor, size, step
        self._arrived: set[int] = set()
        self._next = 0
        self._busy = False
        self._lock = threading.Lock()
        self._digest = hashlib.sha256()

    def arrived(self, start: int) -> None:
        """Report that the part from ``start`` is in the file."""
        with self._lock:
            self._arrived.add(start)
            if self._busy:
                return
            self._busy = True
        while True:
            with self._lock:
                if self._next not in self._arrived:
                    self._busy = False
                    return
                start = self._next
                self._next = start + self._step
            for offset in range(start, min(start + self._step, self._size), BLOCK):
                end = min(offset + BLOCK, start + self._step, self._size)
                self._digest.update(os.pread(self._descriptor, end - offset, offset))

    def hexdigest(self) -> str:
        """The sha256 of the file in hex, once every part has arrived."""
        assert self._next >= self._size
        return self._digest.hexdigest()


def download_parts(
    destination: Path,
    size: int,
    step: int,
    at_once: int,
    fetch: Callable[[int, int, int], bool],
) -> str | None:
    """Fetch a value of at least one byte into a file, in parts.

    Args:
        size, step: bytes of the value, and of a part.
        at_once: parts in transfer.
        fetch: gets the file's descriptor, and start and end of a part, which it writes there;
            False if there is no such value.

    Returns:
        The sha256 of the file, in hex; None if there is no such value.
    """
    with open(destination, "w+b") as file:
        descriptor = file.fileno()
        os.ftruncate(descriptor, size)
        following = PartHasher(descriptor, size, step)

        def part(start: int) -> bool:
            if not fetch(descriptor, start, min(start + step, size)):
                return False
            following.arrived(start)
            return True

        found = in_parallel(part, range(0, size, step), at_once)
        return following.hexdigest() if all(found) else None
