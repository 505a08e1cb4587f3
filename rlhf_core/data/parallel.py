"""Applies a function to a stream of items in several processes, with the results in order.

A short stream is processed in this process. For a longer one at most two items per worker are in
flight, so memory does not grow with the stream. Workers are forked from this process, so they have
its imports and the function's data without a second import or copy. They end with this process,
however it ends.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from rlhf_core.errors import JobFailed
from rlhf_core.system.cpus import cpu_cores
from rlhf_core.system.processes import die_with_parent

MIN_ITEMS = 6  # pieces up to which starting processes costs more than it saves
MAX_WORKERS = 64
# Elsewhere than on Linux, system libraries do not bear a fork; items and function are pickled then.
_START = "fork" if sys.platform == "linux" else "spawn"

T = TypeVar("T")

_work: Callable[[Any], Any] | None = None


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items; a thread makes the next one while one is used. For work that releases the
    interpreter's lock, as that of Arrow does."""
    stream, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, stream, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, stream, end)
            yield item  # type: ignore[misc]  # not `end`


def ordered_map(
    work: Callable[[Any], Any], items: Iterable[Any], workers: int | None = None
) -> Iterator[Any]:
    """work(item) for each item, in order.

    Args:
        work: a picklable function.
        workers: number of processes; None: one per core, 1: this process alone.

    Raises:
        JobFailed: a worker process died.
    """
    count = min(workers or cpu_cores(), MAX_WORKERS)
    stream = iter(items)
    if count > 1:
        first = list(itertools.islice(stream, MIN_ITEMS))
        stream = itertools.chain(first, stream)
        if len(first) == MIN_ITEMS:
            yield from _in_processes(work, stream, count)
            return
    for item in stream:
        yield work(item)


def _in_processes(work: Callable[[Any], Any], items: Iterable[Any], count: int) -> Iterator[Any]:
    executor = ProcessPoolExecutor(
        count, multiprocessing.get_context(_START), initializer=_begin, initargs=(work,)
    )
    waiting: deque[Future[Any]] = deque()
    try:
        for item in items:
            waiting.append(executor.submit(_run, item))
            if len(waiting) >= 2 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise JobFailed(
            f"One of {count} tokenising processes was killed, as happens when memory runs out; "
            "free memory or allow the stage fewer cores, and retry.",
            "lost",
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _begin(work: Callable[[Any], Any]) -> None:
    """In a worker: take the function, and end with the parent."""
    global _work
    die_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the stage's own handler
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _work = work


def _run(item: Any) -> Any:
    assert _work is not None
    return _work(item)
