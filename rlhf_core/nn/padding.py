"""Rows of different lengths as one right-padded batch.

B rows, S positions, N real tokens, M tokens in the loss mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class TokenIndex:
    """Where right-padded rows (B,S) have their tokens: ascending flat indices into B*S positions.

    It is made on the host, where the rows come from. A forward pass that had only the masks would
    read them back from the GPU, and each reading waits for all work that the GPU has been given.
    """

    real: Tensor  # (N,) of the real tokens
    loss: Tensor | None = None  # (M,) of the tokens in the loss mask; none is its row's first

    @classmethod
    def of(cls, mask: Tensor, loss_mask: Tensor | None = None) -> TokenIndex:
        """Read from masks (B,S) bool.

        Raises:
            ValueError: the loss mask has a row's first token.
        """
        if loss_mask is None:
            return cls(flat_indices(mask))
        check_first_column(loss_mask)
        return cls(flat_indices(mask), flat_indices(loss_mask))

    def to(self, device: torch.device) -> TokenIndex:
        """The same on a device, see `to_device`."""
        loss = None if self.loss is None else to_device(self.loss, device)
        return TokenIndex(to_device(self.real, device), loss)


class Batch(NamedTuple):
    """Right-padded rows on a device: the first arguments of `Policy` and `ActorCritic`."""

    input_ids: Tensor  # (B,S)
    mask: Tensor  # (B,S) bool, True at real tokens
    loss_mask: Tensor  # (B,S) bool
    index: TokenIndex


def pad_right(rows: Sequence[Sequence[int]], fill: int = 0) -> tuple[Tensor, Tensor]:
    """Right-pad.

    Returns:
        ids (B,S) int64 and mask (B,S) bool, True at real tokens.
    """
    width = max((len(r) for r in rows), default=0)
    ids = torch.full((len(rows), width), fill, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.as_tensor(row, dtype=torch.long)
        mask[i, : len(row)] = True
    return ids, mask


def rows_on(
    device: torch.device, rows: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor, TokenIndex]:
    """Right-padded rows on a device: input_ids (B,S), mask (B,S) bool, and their index."""
    input_ids, mask = pad_right(rows)
    index = TokenIndex.of(mask)
    return to_device(input_ids, device), to_device(mask, device), index.to(device)


def batch_on(device: torch.device, input_ids: Tensor, mask: Tensor, loss_mask: Tensor) -> Batch:
    """Right-padded rows on a device, from tensors (B,S) on the CPU.

    Raises:
        ValueError: the loss mask has a row's first token.
    """
    index = TokenIndex.of(mask, loss_mask).to(device)
    input_ids, mask, loss_mask = (to_device(x, device) for x in (input_ids, mask, loss_mask))
    return Batch(input_ids, mask, loss_mask, index)


def mark_from(
    sequences: Sequence[Sequence[int]], starts: Sequence[int], device: torch.device
) -> Batch:
    """Sequences whose loss mask is True from each row's start on."""
    input_ids, mask = pad_right(sequences)
    loss_mask = mask & (torch.arange(input_ids.shape[1]) >= torch.tensor(starts).unsqueeze(1))
    return batch_on(device, input_ids, mask, loss_mask)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on the device. A GPU copies it from page-locked memory, in its own time:
    the host goes on."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def check_first_column(loss_mask: Tensor) -> None:
    """Refuse a loss mask (B,S) with a row's first token.

    Raises:
        ValueError: it has one.
    """
    if bool(loss_mask[:, :1].any()):
        raise ValueError("the loss mask asks for column 0, which no token comes before")


def flat_indices(mask: Tensor) -> Tensor:
    """Ascending flat indices (N,) of the True positions of a mask of any shape."""
    return mask.flatten().nonzero().squeeze(1)


# ------------------------------------------------------------------------ tokens without padding


def put(tokens: Tensor, indices: Tensor, rows: int, length: int) -> Tensor:
    """Tokens (N,...) at flat indices (N,) of (rows,length,...), zeros elsewhere."""
    padded = cast(Tensor, _Put.apply(tokens, indices, rows * length))
    return padded.view(rows, length, *tokens.shape[1:])


def take(rows: Tensor, indices: Tensor) -> Tensor:
    """The tokens (N,...) at flat indices (N,) of rows (B,S,...)."""
    return cast(Tensor, _Take.apply(rows.flatten(0, 1), indices))


# Indices are distinct, so that the backward pass may copy where torch's own would add up.
class _Put(torch.autograd.Function):
    """(N,...) -> (B*S,...), zeros at padding; backward the other way."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, indices: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(indices)
        return tokens.new_zeros(size, *tokens.shape[1:]).index_copy_(0, indices, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Take(torch.autograd.Function):
    """(B*S,...) -> (N,...); backward the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.size = rows.shape[0]
        return rows.index_select(0, indices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        shape = (ctx.size, *grad.shape[1:])
        return grad.new_zeros(shape).index_copy_(0, ctx.saved_tensors[0], grad), None
