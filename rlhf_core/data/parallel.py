"""Applies a function to a stream of items in several processes, with the results in order.

A short stream is processed in this process. For a longer one at most two items per worker are in
flight, so memory does not grow with the stream. Workers end with this process, however it ends.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any

from rlhf_core.errors import JobFailed
from rlhf_core.system.cpus import cpu_cores

MIN_ITEMS = 6  # pieces up to which starting processes costs more than it saves
MAX_WORKERS = 16

_work: Callable[[Any], Any] | None = None


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
        count,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(work, os.environ.get("TOKENIZERS_PARALLELISM")),
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


def _start(work: Callable[[Any], Any], parallelism: str | None) -> None:
    global _work
    os.environ["TOKENIZERS_PARALLELISM"] = parallelism or "false"
    _work = work
    parent = multiprocessing.parent_process()
    if parent is not None:
        sentinel = parent.sentinel

        def follow() -> None:
            wait([sentinel])
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()


def _run(item: Any) -> Any:
    assert _work is not None
    return _work(item)
