"""Applies a function to a stream of items in several processes, with the results in order.

A short stream is processed in this process. For a longer one at most two items per worker are in
flight, so memory does not grow with the stream. Workers are forked from a server that imports what
they need, once for all of them; until it has, this process works on items itself. They end with
this process, however it ends.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    work: Callable[[Any], Any],
    items: Iterable[Any],
    workers: int | None = None,
    modules: Sequence[str] = (),
) -> Iterator[Any]:
    """work(item) for each item, in order.

    Args:
        work: a picklable function.
        workers: number of processes; None: one per core, 1: this process alone.
        modules: that ``work`` needs.

    Raises:
        JobFailed: a worker process died.
    """
    count = min(workers or cpu_cores(), MAX_WORKERS)
    stream = iter(items)
    if count > 1:
        first = list(itertools.islice(stream, MIN_ITEMS))
        stream = itertools.chain(first, stream)
        if len(first) == MIN_ITEMS:
            yield from _in_processes(work, stream, count, modules)
            return
    for item in stream:
        yield work(item)


def _in_processes(
    work: Callable[[Any], Any], items: Iterable[Any], count: int, modules: Sequence[str]
) -> Iterator[Any]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *modules])
    # A queue's own thread sends the function, which may be large: a process argument would hold up
    # this process until the worker has started.
    copies: Any = context.Queue()
    for _ in range(count):
        copies.put(work)
    parallelism = os.environ.get("TOKENIZERS_PARALLELISM")
    executor = ProcessPoolExecutor(
        count, mp_context=context, initializer=_start, initargs=(copies, parallelism)
    )
    # Starting the first process waits for the server's imports.
    starting = threading.Thread(target=executor.submit, args=(os.getpid,), daemon=True)
    starting.start()
    waiting: deque[Future[Any]] = deque()
    try:
        for item in items:
            if starting.is_alive() and not waiting:
                yield work(item)
                continue
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
        starting.join()
        executor.shutdown(wait=True, cancel_futures=True)
        copies.cancel_join_thread()  # of workers that never started
        copies.close()


def _start(copies: Any, parallelism: str | None) -> None:
    """In a worker: take the function, and end with the parent."""
    global _work
    os.environ["TOKENIZERS_PARALLELISM"] = parallelism or "false"
    parent = multiprocessing.parent_process()
    if parent is not None:
        sentinel = parent.sentinel

        def follow() -> None:
            wait([sentinel])
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()
    _work = copies.get()


def _run(item: Any) -> Any:
    assert _work is not None
    return _work(item)
