"""A cache of models in memory: each is loaded once, the least recently used are evicted.

A model in use is never evicted. If two models of one question do not fit together, the second one
waits until the first is done: their replies then come one after the other.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_core.errors import OutOfMemory
from rlhf_core.model_files.folder_check import read_tensors
from rlhf_core.system.host_memory import format_bytes
from rlhf_core.system.machine import free_memory

log = logging.getLogger("rlhf_core.playground")


@dataclass
class _Slot:
    """A model in memory, or one that is being loaded. ``size`` is in bytes."""

    size: int
    users: int = 0
    model: Any = None
    ready: bool = False


@dataclass
class ModelPool:
    """Models by the digest of their artifact. Safe to use from threads.

    Attributes:
        limit: bytes that all models together may use.
    """

    limit: int
    _slots: OrderedDict[str, _Slot] = field(default_factory=OrderedDict)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    # transformers changes globals (default device, initialisation) while it loads.
    _loading: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def use(self, digest: str, folder: Path, load: Callable[[Path], Any]) -> Iterator[Any]:
        """Lend a model, which stays in memory until the block ends.

        Args:
            folder: the model's files.
            load: called with the folder if the model is not in memory.

        Raises:
            OutOfMemory: the model alone is larger than the limit.
            RLHFError: `load` raised it; the next use loads again.
        """
        slot = self._acquire(digest, weight_bytes(folder))
        try:
            if not slot.ready:  # the thread that made the slot; others wait in _acquire
                with self._loading:
                    slot.model = load(folder)
                with self._changed:
                    slot.ready = True
                    self._changed.notify_all()
            yield slot.model
        finally:
            with self._changed:
                slot.users -= 1
                if not slot.ready:
                    self._slots.pop(digest, None)
                self._changed.notify_all()

    def loaded(self) -> list[str]:
        """Digests of the models in memory, the least recently used first."""
        with self._changed:
            return [digest for digest, slot in self._slots.items() if slot.ready]

    def _acquire(self, digest: str, size: int) -> _Slot:
        """The slot of a model, with this thread as a user; a new slot has no model yet."""
        if size > self.limit:
            raise OutOfMemory(
                f"The model needs {format_bytes(size)}, but the page may use "
                f"{format_bytes(self.limit)} in all: restart it with a larger --memory-gb, or "
                "choose a smaller model."
            )
        with self._changed:
            while True:
                slot = self._slots.get(digest)
                if slot is not None and slot.ready:
                    break
                if slot is None and self._evict(size):
                    slot = self._slots[digest] = _Slot(size)
                    break
                self._changed.wait()
            slot.users += 1
            self._slots.move_to_end(digest)
            return slot

    def _evict(self, size: int) -> bool:
        """Unload unused models, the least recently used first, until ``size`` bytes fit.

        Returns:
            False if they do not fit because the other models are in use.
        """
        for digest, slot in list(self._slots.items()):
            if self._total() + size <= self.limit:
                break
            if slot.users == 0:
                log.info("unloaded model %s (%s)", digest[:12], format_bytes(slot.size))
                del self._slots[digest]
                slot.model = None
                _free_memory()
        return self._total() + size <= self.limit

    def _total(self) -> int:
        return sum(slot.size for slot in self._slots.values())


def _free_memory() -> None:
    gc.collect()
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def weight_bytes(folder: Path) -> int:
    """Bytes of a model's tensors in its files.

    Raises:
        ModelError: the files are missing or damaged.
    """
    return sum(tensor.size for tensor in read_tensors(folder).values())


def default_limit() -> int:
    """Bytes: 80 % of the GPU's free memory, or half of the main memory that is free here."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0] * 0.8)
    return free_memory() // 2
