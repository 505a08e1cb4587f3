"""Language modelling: batches, and the held-out loss."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.nn.modules import Policy
from rlhf_core.nn.padding import Batch, TokenIndex, batch_on, pad_right
from rlhf_core.runtime.distributed import Group
from rlhf_core.training.batching import scoring_passes
from rlhf_core.training.reading import read_all
from rlhf_core.training.strategy import Strategy


def trained_tokens(row: dict[str, Any]) -> int:
    """Tokens of a row in the loss mask; nothing predicts the first token."""
    return sum(row["trainable"][1:])


def collate(rows: Sequence[dict[str, Any]], device: torch.device) -> Batch:
    """Rows of a data set, with their trained tokens in the loss mask."""
    input_ids, mask = pad_right([r["input_ids"] for r in rows])
    loss_mask, _ = pad_right([r["trainable"] for r in rows])
    loss_mask[:, 0] = 0
    return batch_on(device, input_ids, mask, loss_mask.bool())


@torch.no_grad()
def heldout_loss(
    module: Policy, rows: Rows, group: Group, micro_batch_size: int, strategy: Strategy | None
) -> dict[str, float]:
    """Held-out loss (nats per trained token), also of each source of a mixture, and perplexity;
    empty without held-out rows."""
    if len(rows) == 0:
        return {}
    lengths = rows.lengths("input_ids")
    sums = {}
    for source, numbers in (rows.sources or {"": np.arange(len(rows))}).items():
        found = []
        for positions, counts in scoring_passes(lengths[numbers].tolist(), group, micro_batch_size):
            batch = collate(rows.take(numbers[positions]), group.device)
            with strategy.autocast() if strategy else contextlib.nullcontext():
                logprobs = module(*batch)
            if counts:
                found.append(loss_and_tokens(logprobs, batch.index))
        sums[source] = sum_of_losses(found, group)
    return loss_per_token(sums)


def loss_and_tokens(logprobs: Tensor, index: TokenIndex) -> dict[str, float | Tensor]:
    """Of a held-out micro-batch: the sum of its losses (nats), and how many tokens have one."""
    assert index.loss is not None
    return {"loss": -logprobs.double().sum(), "tokens": float(index.loss.numel())}


def sum_of_losses(found: Sequence[Mapping[str, float | Tensor]], group: Group) -> Tensor:
    """Sum of the losses and number of tokens (2,) over all ranks, from the `loss_and_tokens` of
    this rank's micro-batches. Every rank calls."""
    sums = torch.zeros(2, dtype=torch.float64)
    for share in read_all(found):
        sums += torch.tensor([share["loss"], share["tokens"]])
    return group.sum(sums)


def loss_per_token(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Held-out loss and perplexity, and heldout_loss/NAME of each of several sources.

    Args:
        sums: source -> what `sum_of_losses` found; without a token for a source without rows.
    """
    total = torch.stack(list(sums.values())).sum(dim=0)
    loss = float(total[0] / total[1])
    found = {"heldout_loss": loss, "heldout_perplexity": math.exp(min(loss, 700.0))}
    of_sources = {k: float(s[0] / s[1]) for k, s in sums.items() if k and s[1]}
    return found | {f"heldout_loss/{name}": value for name, value in of_sources.items()}
