"""Something that one process makes once, and a process that is forked from it makes anew."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class ProcessLocal(Generic[T]):
    """Made on first use, by one thread; safe across a fork, also while another thread makes it."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: tuple[int, T] | None = None  # with the process that made it
        self._lock, self._owner = threading.Lock(), os.getpid()

    def get(self) -> T:
        """That of this process. Raises what making it raises; the next call then tries again."""
        made, here = self._made, os.getpid()
        if made is not None and made[0] == here:
            return made[1]
        if self._owner != here:
            # A lock that a thread of the parent held would never be released.
            self._lock, self._owner = threading.Lock(), here
        with self._lock:
            made = self._made
            if made is None or made[0] != here:
                made = self._made = here, self._make()
        return made[1]
