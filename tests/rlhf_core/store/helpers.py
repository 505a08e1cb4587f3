"""What several test files need: reading folders, reaching behind the store, child processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rlhf_core.store import FileEntry, Store
from rlhf_core.store.blobs import blob_key

FORK = multiprocessing.get_context("fork")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def blobs(store: Store) -> list[str]:
    return store._backend.keys("blobs/")


def overwrite_blob(store: Store, entry: FileEntry, data: bytes) -> None:
    store._backend.write(blob_key(entry.sha256), data)


def flip_bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def start(function: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """A forked child, as DataLoader workers are."""
    child = FORK.Process(target=function, args=arguments, daemon=True)
    child.start()
    return child


def results_of(function: Callable[..., Any], calls: list[tuple[Any, ...]]) -> list[Any]:
    """What a function returns in one forked child per call, all let go at the same moment."""
    queue = FORK.Queue()
    gate = FORK.Barrier(len(calls))

    def child(number: int, arguments: tuple[Any, ...]) -> None:
        gate.wait(30)
        try:
            queue.put((number, function(*arguments)))
        except Exception as error:
            queue.put((number, error))

    children = [start(child, number, arguments) for number, arguments in enumerate(calls)]
    found = dict(queue.get(timeout=60) for _ in children)
    for each in children:
        each.join(30)
    return [found[number] for number in range(len(calls))]
