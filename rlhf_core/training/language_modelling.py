"""Language modelling: batches, and the held-out loss."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.nn.modules import Policy
from rlhf_core.nn.padding import pad_right
from rlhf_core.runtime.distributed import Group
from rlhf_core.training.batching import scoring_passes
from rlhf_core.training.strategy import Strategy


def trained_tokens(row: dict[str, Any]) -> int:
    """Tokens of a row in the loss mask; nothing predicts the first token."""
    return sum(row["trainable"][1:])


def collate(rows: Sequence[dict[str, Any]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids (B,S), mask (B,S) bool, loss_mask (B,S) bool of rows of a data set."""
    input_ids, mask = pad_right([r["input_ids"] for r in rows])
    loss_mask, _ = pad_right([r["trainable"] for r in rows])
    loss_mask[:, 0] = 0
    return input_ids.to(device), mask.to(device), loss_mask.bool().to(device)


@torch.no_grad()
def heldout_loss(
    module: Policy, rows: Rows, group: Group, micro_batch_size: int, strategy: Strategy | None
) -> dict[str, float]:
    """Held-out loss (nats per trained token) and perplexity; empty without held-out rows."""
    if len(rows) == 0:
        return {}
    sums = torch.zeros(2, dtype=torch.float64)  # loss, tokens
    lengths = rows.lengths("input_ids").tolist()
    for positions, counts in scoring_passes(lengths, group, micro_batch_size):
        batch = collate(rows.take(positions), group.device)
        with strategy.autocast() if strategy else contextlib.nullcontext():
            logprobs = module(*batch)
        if counts:
            sums += torch.tensor([-logprobs.double().sum().item(), batch[2].sum().item()])
    return loss_per_token(group.sum(sums))


def loss_per_token(total: Tensor) -> dict[str, float]:
    """Held-out loss and perplexity from the sums (2,) of losses and of tokens."""
    loss = float(total[0] / total[1])
    return {"heldout_loss": loss, "heldout_perplexity": math.exp(min(loss, 700.0))}
