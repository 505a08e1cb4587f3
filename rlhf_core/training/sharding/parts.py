"""The parts of tensors that ranks hold: copied to the host, written, and read by any other ranks.

Every strategy gives a rank some elements in a row of each flattened tensor: rows of it (fsdp2), a
piece of it with padding at its end (ZeRO), or a piece that the rank saves for all (ddp). So a part
is a range of indices, and any number of ranks can read from files what any other number has
written.

torch.distributed.checkpoint is not used: its metadata is a pickle, and its planners are for pieces
in more than one dimension. Here the files are safetensors, and the index of all parts is JSON.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

Range = tuple[int, int]
"""Index of the first element in the flattened tensor, and number of elements."""


@dataclass(frozen=True)
class Part:
    """Some elements in a row of a tensor.

    Attributes:
        values: (n,) the elements.
        start: index of the first one in the flattened tensor.
        shape: of the whole tensor.
    """

    values: Tensor
    start: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """Where a saved tensor is: its shape, and for each part the file and the range."""

    shape: tuple[int, ...]
    parts: tuple[tuple[str, int, int], ...]

    def overlapping(self, wanted: Range) -> list[tuple[str, int, int]]:
        """The parts that have elements of a range."""
        first, count = wanted
        return [p for p in self.parts if p[1] < first + count and first < p[1] + p[2]]


Index = dict[str, Entry]


def share(count: int, rank: int, size: int) -> Range:
    """The range that a rank saves of a tensor that every rank holds."""
    each = -(-count // size)
    start = min(rank * each, count)
    return start, min(each, count - start)


def whole_part(tensor: Tensor) -> Part:
    """A whole tensor as the only part of it."""
    return Part(tensor.reshape(-1), 0, tuple(tensor.shape))


def to_host(parts: Mapping[str, Part]) -> dict[str, Part]:
    """A copy in the host's memory, in pages that a GPU writes to directly."""
    result, on_gpu = {}, False
    for name, part in parts.items():
        on_gpu = on_gpu or part.values.is_cuda
        copy = torch.empty(
            part.values.shape, dtype=part.values.dtype, pin_memory=part.values.is_cuda
        )
        copy.copy_(part.values, non_blocking=True)
        result[name] = Part(copy, part.start, part.shape)
    if on_gpu:
        torch.cuda.synchronize()
    return result


def write_parts(parts: Mapping[str, Part], file: Path) -> None:
    """Write the elements, without copying them first."""
    save_file({name: part.values for name, part in parts.items()}, file)


def index_parts(parts: Mapping[str, Part], file: str) -> Index:
    """The index of one file."""
    return {
        name: Entry(part.shape, ((file, part.start, part.values.numel()),))
        for name, part in parts.items()
    }


def merge(indices: Iterable[Index]) -> Index:
    """The index of all files."""
    found: Index = {}
    for index in indices:
        for name, entry in index.items():
            before = found[name].parts if name in found else ()
            found[name] = Entry(entry.shape, (*before, *entry.parts))
    return found


def needed_files(index: Index, held: Mapping[str, Range]) -> set[str]:
    """The files that have elements which a rank needs.

    Args:
        held: trained parameter -> what the rank holds of it, and of its "parameter|state".
    """
    found = set()
    for name, entry in index.items():
        wanted = held.get(name) or held.get(name.rpartition("|")[0])
        scalar = wanted is None or not entry.shape
        found |= {p[0] for p in (entry.parts if scalar else entry.overlapping(wanted))}
    return found


def index_whole(files: Iterable[Path]) -> Index:
    """The index of files with whole tensors, as earlier versions have written them."""
    found = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                shape = tuple(file.get_slice(name).get_shape())
                found[name] = Entry(shape, ((path.name, 0, math.prod(shape)),))
    return found


def to_json(index: Index) -> dict[str, Any]:
    """The index as JSON; see `from_json`."""
    return {name: {"shape": e.shape, "parts": e.parts} for name, e in index.items()}


def from_json(value: Mapping[str, Any]) -> Index:
    """The index that `to_json` was given."""
    return {
        name: Entry(tuple(entry["shape"]), tuple(tuple(part) for part in entry["parts"]))
        for name, entry in value.items()
    }


class Saved:
    """Saved tensors, of which any range can be read; its files may be a part of all."""

    def __init__(self, folder: Path, index: Index) -> None:
        self.index = index
        self._folder = folder
        self._files: dict[str, Any] = {}

    def read(self, name: str, wanted: Range) -> Tensor:
        """A range (n,) of a flattened tensor, in memory of its own."""
        first, count = wanted
        pieces = self.index[name].overlapping(wanted)
        result: Tensor | None = None
        filled = 0
        for file, start, size in pieces:
            source = self._file(file).get_tensor(name).reshape(-1)
            assert source.numel() == size, f"{file} has another part of {name} than its index says"
            if result is None:
                result = torch.empty(count, dtype=source.dtype)
            low, high = max(first, start), min(first + count, start + size)
            result[low - first : high - first] = source[low - start : high - start]
            filled += high - low
        assert filled == count, f"{name} has {count - filled} of {count} elements in no file"
        return torch.empty(0) if result is None else result

    def whole(self, name: str) -> Tensor:
        """A whole tensor."""
        shape = self.index[name].shape
        return self.read(name, (0, math.prod(shape))).view(shape)

    def _file(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = safe_open(self._folder / name, framework="pt")
        return self._files[name]
