"""Rows of different lengths as one right-padded batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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


def mark_from(
    sequences: Sequence[Sequence[int]], starts: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids (B,S), mask (B,S) bool, and loss_mask (B,S) bool: True from each row's start on."""
    input_ids, mask = pad_right(sequences)
    loss_mask = mask & (torch.arange(input_ids.shape[1]) >= torch.tensor(starts).unsqueeze(1))
    return input_ids.to(device), mask.to(device), loss_mask.to(device)


Batch = tuple[Tensor, Tensor, Tensor]  # input_ids (b,S), mask (b,S) bool, loss_mask (b,S) bool
