"""Numbers that a GPU has computed, read together.

A reading waits until the GPU has done all that it was given, and leaves it idle until the host has
given it more. So the numbers of many micro-batches stay on the GPU until they are wanted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def detached(numbers: Mapping[str, float | Tensor]) -> dict[str, float | Tensor]:
    """The same numbers, none of which keeps a graph in memory."""
    return {k: v.detach() if isinstance(v, Tensor) else v for k, v in numbers.items()}


def read_all(found: Sequence[Mapping[str, float | Tensor]]) -> list[dict[str, float]]:
    """Every number of every mapping as a float: one copy from the device, whatever their count.

    Args:
        found: floats, and tensors of one element that are all on one device.
    """
    values = [value for numbers in found for value in numbers.values()]
    tensors = [value.reshape(()) for value in values if isinstance(value, Tensor)]
    read = iter(torch.stack(tensors).tolist() if tensors else ())
    return [
        {name: next(read) if isinstance(value, Tensor) else value for name, value in n.items()}
        for n in found
    ]


def read_rows(found: Sequence[tuple[Sequence[int], Tensor]]) -> list[tuple[int, float]]:
    """A number of each row of many micro-batches, with the row's position, by one copy.

    Args:
        found: positions of a micro-batch's rows, and their numbers (b,).
    """
    positions = [position for micro_batch, _ in found for position in micro_batch]
    numbers = torch.cat([numbers for _, numbers in found]).tolist() if found else []
    return list(zip(positions, numbers, strict=True))
