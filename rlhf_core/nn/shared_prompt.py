"""Two replies to one prompt in one row, so that the prompt is computed once.

    row        p p p c c r r r .        prompt, chosen, rejected, padding
    segments   0 0 0 1 1 2 2 2 -1
    positions  0 1 2 3 4 3 4 5 0

A token sees the prompt and its own reply up to itself, so each reply's numbers are those of a row
of its own. That needs a model that takes such a mask as it is; `takes_block_masks` finds out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_core.nn.backbone import BareBackbone, backbone_hidden
from rlhf_core.nn.padding import pad_right
from rlhf_core.nn.probe_model import once, same_numbers

LONGEST = 2048
"""Tokens of a row above which the mask, which grows with their square, costs more than it saves."""


def shared_length(row: dict[str, Any]) -> int:
    """Tokens of a pair whose replies share a row."""
    return len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])


def collate_shared(
    rows: Sequence[dict[str, Any]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, position_ids and segments, (b,S) each, of pairs with a prompt of some tokens."""
    ids, positions, segments = [], [], []
    for row in rows:
        prompt, chosen, rejected = (row[k] for k in ("prompt_ids", "chosen_ids", "rejected_ids"))
        ids.append([*prompt, *chosen, *rejected])
        start = len(prompt)
        positions.append([*range(start + len(chosen)), *range(start, start + len(rejected))])
        segments.append([0] * start + [1] * len(chosen) + [2] * len(rejected))
    return (
        pad_right(ids)[0].to(device),
        pad_right(positions)[0].to(device),
        pad_right(segments, -1)[0].to(device),
    )


def block_mask(segments: Tensor) -> Tensor:
    """Which position sees which, (b,1,S,S) bool.

    Args:
        segments: (b,S), 0 prompt, 1 and 2 the replies, -1 padding, which sees itself.
    """
    size = segments.shape[1]
    before = torch.ones(size, size, dtype=torch.bool, device=segments.device).tril()  # (S,S)
    own, seen = segments.unsqueeze(2), segments.unsqueeze(1)  # (b,S,1), (b,1,S)
    return ((seen == 0) | (seen == own)).logical_and(before).unsqueeze(1)


def ends_of(segments: Tensor, segment: int) -> Tensor:
    """Position (b,) of the last token of a segment in each row."""
    places = torch.arange(1, segments.shape[1] + 1, device=segments.device)
    return ((segments == segment).long() * places).argmax(dim=1)


@once
def takes_block_masks(backbone: Any) -> bool:
    """Whether a backbone's numbers for a shared row are those of rows of their own.

    Tried out on a prompt of two tokens and replies of two and three. llama, qwen2, gpt2, opt and
    their like do; bloom, which makes its positions of the mask, does not.
    """
    device, model = next(backbone.parameters()).device, BareBackbone(backbone)
    row = {"prompt_ids": [3, 4], "chosen_ids": [5, 6], "rejected_ids": [7, 8, 9]}
    ids, positions, segments = collate_shared([row], device)
    alone = torch.tensor([[3, 4, 7, 8, 9]], device=device)
    try:
        together = backbone_hidden(model, ids, block_mask(segments), positions)[:, 4:]
        want = backbone_hidden(model, alone, torch.ones_like(alone))[:, 2:]
    except (RuntimeError, ValueError, TypeError, IndexError):  # a model that takes no such mask
        return False
    return same_numbers(together, want, 1e-4)
