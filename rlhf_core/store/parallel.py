"""A small thread pool for transfers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

FILES_AT_ONCE = 4
REQUESTS_AT_ONCE = 8  # of a few bytes each

T = TypeVar("T")
R = TypeVar("R")


def in_parallel(function: Callable[[T], R], items: Iterable[T], threads: int) -> list[R]:
    """The function's results in the order of the items.

    Raises:
        The first exception of a call; the calls that have not started are cancelled.
    """
    todo = list(items)
    if len(todo) <= 1:
        return [function(item) for item in todo]
    pool = ThreadPoolExecutor(min(threads, len(todo)), thread_name_prefix="rlhf-store")
    try:
        return list(pool.map(function, todo))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
