"""Calls with a time limit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Raised(Exception):
    """Wraps an exception of somebody's code, to tell it from our own."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


def call_in_time(function: Callable[[], T], seconds: float) -> T:
    """The result of a function, in a thread of its own.

    Python cannot stop a thread: after the time limit it goes on until the process ends.

    Raises:
        TimeoutError: it took longer. Raised: it raised an exception.
    """
    box: dict[str, Any] = {}

    def work() -> None:
        try:
            box["result"] = function()
        except BaseException as error:  # even a SystemExit, which would end only the thread
            box["error"] = error

    thread = threading.Thread(target=work, name="environment", daemon=True)
    thread.start()
    thread.join(min(seconds, threading.TIMEOUT_MAX))
    if thread.is_alive():
        raise TimeoutError
    if "error" in box:
        raise Raised(box["error"])
    return box["result"]  # type: ignore[no-any-return]
