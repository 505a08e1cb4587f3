"""Reads and checks the header of a safetensors file: 8 bytes of length, JSON, then the tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from rlhf_core.errors import ModelError

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2,
    "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip


class HeaderProblem(ModelError):
    """A safetensors file is cut short or damaged; the text names file, bytes found and needed."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: dtype as safetensors names it (F32, BF16, ...), shape, bytes."""

    dtype: str
    shape: tuple[int, ...]
    size: int

    @property
    def elements(self) -> int:
        return prod(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Name -> tensor of one file, after checking that the file holds all their bytes.

    Raises:
        HeaderProblem: the file is empty, cut short, too long or no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if size < 8:
            raise HeaderProblem(
                f"{path} is cut short: {size} bytes, not even a header; download it again"
            )
        if length > MAX_HEADER:
            raise HeaderProblem(
                f"{path} is not a safetensors file: its first 8 bytes announce a header of "
                f"{length:,} bytes (HeaderTooLarge, at most {MAX_HEADER:,}); it starts with "
                f"{start!r}: download it again, or convert it if it is another format"
            )
        if length > size - 8:
            raise HeaderProblem(
                f"{path} is cut short: its header needs {length + 8:,} bytes, the file has "
                f"{size:,}; download it again"
            )
        text = file.read(length)
    try:
        header = json.loads(text)
        tensors = {
            name: _tensor(name, value) for name, value in header.items() if name != "__metadata__"
        }
        end = max(
            (value["data_offsets"][1] for n, value in header.items() if n in tensors), default=0
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise HeaderProblem(
            f"{path} has a damaged safetensors header ({type(error).__name__}: {error}); download "
            "it again"
        ) from error
    needed = 8 + length + end
    if needed > size:
        raise HeaderProblem(
            f"{path} is cut short: its tensors need {needed:,} bytes, the file has {size:,} "
            f"({needed - size:,} missing); download it again"
        )
    if needed < size:
        raise HeaderProblem(
            f"{path} has {size - needed:,} bytes too many: its tensors need {needed:,} bytes, the "
            f"file has {size:,}; download it again"
        )
    return tensors


def _tensor(name: str, value: dict[str, Any]) -> TensorInfo:
    begin, end = value["data_offsets"]
    tensor = TensorInfo(str(value["dtype"]), tuple(int(n) for n in value["shape"]), end - begin)
    width = BYTES.get(tensor.dtype)
    if width is not None and tensor.elements * width != tensor.size:
        raise ValueError(
            f"tensor {name} of shape {list(tensor.shape)} and dtype {tensor.dtype} has "
            f"{tensor.size} bytes instead of {tensor.elements * width}"
        )
    return tensor
