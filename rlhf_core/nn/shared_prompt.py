"""Both replies to a prompt in one row, so that the prompt is computed once.

    row        p p p c c r r r .        prompt, chosen, rejected, padding
    segments   0 0 0 1 1 2 2 2 -1
    positions  0 1 2 3 4 3 4 5 0

A token sees the prompt and its own reply up to itself, so the numbers are those of separate rows.
The model must take such a mask unchanged; `takes_block_masks` tries it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_core.nn.backbone import BareBackbone, backbone_hidden, position_ids_from_mask
from rlhf_core.nn.fast_paths import FastPath, Pairs, switched_on
from rlhf_core.nn.padding import pad_right, to_device
from rlhf_core.nn.probe_model import trial_length

LONGEST = 2048
"""Maximum tokens of a shared row. The mask grows with their square, and then costs too much."""


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
        to_device(pad_right(ids)[0], device),
        to_device(pad_right(positions)[0], device),
        to_device(pad_right(segments, -1)[0], device),
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
    indices = torch.arange(1, segments.shape[1] + 1, device=segments.device)
    return ((segments == segment).long() * indices).argmax(dim=1)


def split_rows(input_ids: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
    """Shared rows (b,S) as separate, right-padded rows, those of the chosen replies first.

    Returns:
        input_ids (2b,S) and mask (2b,S) bool.
    """
    ids, masks = [], []
    for reply in (1, 2):
        own = (segments == 0) | (segments == reply)
        order = (~own).long().argsort(dim=1, stable=True)
        ids.append(input_ids.gather(1, order))
        masks.append(own.gather(1, order))
    return torch.cat(ids), torch.cat(masks)


def takes_block_masks(backbone: Any) -> bool:
    """Whether a backbone gives the same numbers for shared rows as for separate ones.

    llama, qwen2, gpt2, opt and similar: yes. bloom, which derives positions from the mask: no.
    """
    return switched_on() and not _has_short_window(backbone) and PATH.works(backbone)


def _has_short_window(backbone: Any) -> bool:
    """Whether attention has a window that a shared row may exceed; the mask would replace it."""
    config = BareBackbone(backbone).base_model.config
    names = ("sliding_window", "attention_chunk_size")
    window = min(getattr(config, name, None) or LONGEST for name in names)
    if window < LONGEST:
        PATH.log_off(backbone, f"its attention has a window of {window} positions")
    return window < LONGEST


def _trial(backbone: Any) -> Pairs:
    model = BareBackbone(backbone)
    ids, positions, segments = collate_shared(_trial_pairs(model.base_model), _device(backbone))
    shared = backbone_hidden(model, ids, block_mask(segments), positions)  # (b,S,d)
    own_ids, mask = split_rows(ids, segments)
    plain = backbone_hidden(model, own_ids, mask, position_ids_from_mask(mask))  # (2b,S,d)
    pairs = []
    for reply, (hidden, real) in enumerate(zip(plain.chunk(2), mask.chunk(2), strict=True), 1):
        pairs.append((shared[(segments == 0) | (segments == reply)], hidden[real]))
    return pairs


def _trial_pairs(base: Any) -> list[dict[str, Any]]:
    """Two pairs, of 112 and 96 tokens where the model takes that many."""
    unit, size = max(1, trial_length(base) // 16), base.get_input_embeddings().weight.shape[0]
    pairs = []
    for start, lengths in ((3, (6, 5, 3)), (5, (3, 2, 7))):
        ids = [[(start + 7 * i) % size for i in range(unit * length)] for length in lengths]
        pairs.append(dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), ids, strict=True)))
    return pairs


def _device(module: Any) -> torch.device:
    return next(module.parameters()).device


PATH = FastPath(
    "pairs that share a row",
    "the prompt of each pair is computed twice",
    _trial,
)
