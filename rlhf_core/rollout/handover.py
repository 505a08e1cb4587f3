"""Weights that one process writes once into memory, and others on the machine read from there.

The format is that of safetensors. The memory has no name (memfd): it is freed when the last process
that uses it has let go or is dead, however it died, and a container's small /dev/shm does not bound
it. Where the system has none, it is a file.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

Head = tuple[str, torch.dtype, tuple[int, ...]]
"""Name, type and shape of a tensor."""


class Handover:
    """One version of the weights. `path` can be opened by every process of the same user."""

    def __init__(self, path: Path, file: BinaryIO | None = None) -> None:
        """A file that exists; see `written`."""
        self.path = path
        self._file = file

    @classmethod
    def written(cls, folder: Path, heads: Sequence[Head], tensors: Iterable[Tensor]) -> Handover:
        """Write tensors, one after another; at no time are two copies of all in memory.

        Args:
            folder: for a file, where the system has no memory without a name.
            heads: of the tensors, in their order.
        """
        file: BinaryIO
        if sys.platform == "linux":
            file = os.fdopen(os.memfd_create("rlhf-weights"), "w+b")
            path = _path(file)
        else:
            path = folder / "weights.safetensors"
            path.unlink(missing_ok=True)  # a process may still read the one before
            file = path.open("w+b")
        file.write(_header(heads))
        for tensor in tensors:
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            file.write(memoryview(flat.view(torch.uint8).numpy()))
        file.flush()
        return cls(path, file)

    def shared(self) -> Handover:
        """The same weights, for as long as either has not let go."""
        if self._file is None or not self.path.is_relative_to("/proc"):
            return self
        file = os.fdopen(os.dup(self._file.fileno()), "rb")
        return Handover(_path(file), file)

    def copy(self, file: Path) -> None:
        """Write it into a file on a disk."""
        shutil.copyfile(self.path, file)

    def close(self) -> None:
        """Let go of the memory; a second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _path(file: BinaryIO) -> Path:
    return Path(f"/proc/{os.getpid()}/fd/{file.fileno()}")


def read(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of what `Handover.written` has written; they are mapped, not copied."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            yield name, file.get_tensor(name)


def _header(heads: Sequence[Head]) -> bytes:
    table, position = {}, 0
    for name, dtype, shape in heads:
        size = torch.Size(shape).numel() * dtype.itemsize
        offsets = [position, position + size]
        table[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": offsets}
        position += size
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)  # the tensors are aligned
    return len(text).to_bytes(8, "little") + text
