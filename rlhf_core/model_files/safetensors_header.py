"""Reads and checks the header of a safetensors file (8 bytes of length, JSON, then the tensors)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from rlhf_core.errors import ModelError

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16,
    "BF16": 16, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


class HeaderProblem(ModelError):
    """A truncated or damaged safetensors file; the text gives actual and expected bytes."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: dtype as in safetensors (F32, BF16, ...), shape, size in bytes."""

    dtype: str
    shape: tuple[int, ...]
    size: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one file by name, after checking that the file has exactly their bytes.

    Raises:
        HeaderProblem: the file is empty, truncated, too long or not a safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if size < 8:
            raise HeaderProblem(
                f"{path} is truncated: {size} bytes, less than a header; download it again"
            )
        if length > MAX_HEADER:
            raise HeaderProblem(
                f"{path} is not a safetensors file: its first 8 bytes announce a header of "
                f"{length:,} bytes (HeaderTooLarge, at most {MAX_HEADER:,}); it starts with "
                f"{start!r}: download it again, or convert it if it is another format"
            )
        if length > size - 8:
            raise HeaderProblem(
                f"{path} is truncated: its header needs {length + 8:,} bytes, the file has "
                f"{size:,}; download it again"
            )
        text = file.read(length)
    try:
        tensors, end = _parse(text)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HeaderProblem(
            f"{path} has a damaged safetensors header ({type(error).__name__}: "
            f"{str(error)[:300]}); download it again"
        ) from error
    needed = 8 + length + end
    if needed > size:
        raise HeaderProblem(
            f"{path} is truncated: its tensors need {needed:,} bytes, the file has {size:,} "
            f"({needed - size:,} missing); download it again"
        )
    if needed < size:
        raise HeaderProblem(
            f"{path} has {size - needed:,} bytes too many: its tensors need {needed:,} bytes, the "
            f"file has {size:,}; download it again"
        )
    return tensors


def _parse(text: bytes) -> tuple[dict[str, TensorInfo], int]:
    """The tensors, and the end of the last one in bytes. Checks that they leave no gaps."""
    if not text.startswith(b"{"):
        raise ValueError(f"it starts with {text[:8]!r} instead of a JSON object")
    header = json.loads(text.decode("utf-8"), parse_constant=_no_number)
    json.dumps(header, ensure_ascii=False).encode("utf-8")  # raises for a lone surrogate
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not all(isinstance(value, str) for value in metadata.values()):
        raise TypeError("__metadata__ holds values that are not texts")
    placed = {name: _tensor(name, value) for name, value in header.items()}
    end = 0
    for name, (begin, tensor) in sorted(placed.items(), key=lambda item: _place(item[1])):
        if begin != end:
            raise ValueError(
                f"tensor {name} begins at byte {begin:,} of the data instead of {end:,}"
            )
        end += tensor.size
    return {name: tensor for name, (_, tensor) in placed.items()}, end


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _place(placed: tuple[int, TensorInfo]) -> tuple[int, int]:
    return placed[0], placed[1].size


def _tensor(name: str, value: dict[str, Any]) -> tuple[int, TensorInfo]:
    """The start of a tensor in bytes, and the tensor."""
    shape, offsets = value["shape"], value["data_offsets"]
    for numbers in (shape, offsets):
        if type(numbers) is not list or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(f"tensor {name}: {numbers!r} is not a list of sizes")
    if len(offsets) != 2 or offsets[1] < offsets[0]:
        raise ValueError(f"tensor {name}: data_offsets {offsets!r} are not a begin and an end")
    bits = BITS.get(value["dtype"])
    if bits is None:
        raise ValueError(f"tensor {name} has the unknown dtype {value['dtype']!r}")
    tensor = TensorInfo(value["dtype"], tuple(shape), offsets[1] - offsets[0])
    if tensor.elements * bits != tensor.size * 8:
        raise ValueError(
            f"tensor {name} of shape {list(tensor.shape)} and dtype {tensor.dtype} has "
            f"{tensor.size} bytes instead of {tensor.elements * bits / 8:.4g}"
        )
    return offsets[0], tensor
