"""A rollout's replies as minibatches and micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf_core.jobs import OnlineJob
from rlhf_core.nn.padding import Batch, mark_from
from rlhf_core.training.batching import split_batch
from rlhf_core.training.strategy import Strategy


def split_minibatches(replies: int, minibatches: int) -> list[list[int]]:
    """Row numbers of a rollout, dealt out in turn."""
    return [list(range(i, replies, minibatches)) for i in range(minibatches)]


def micro_batches(
    job: OnlineJob, strategy: Strategy, sequences: Sequence[list[int]], minibatches: list[list[int]]
) -> list[list[int]]:
    """This rank's micro-batches, as row numbers of the rollout, minibatch after minibatch."""
    result = []
    for rows in minibatches:
        for positions in split_batch(
            [len(sequences[r]) for r in rows],
            strategy.rank, strategy.world_size, job.resources.micro_batch_size, strategy.padding,
        ):  # fmt: skip
            result.append([rows[p] for p in positions])
    return result


def collate_responses(
    sequences: Sequence[list[int]],
    prompt_lengths: Sequence[int],
    positions: Sequence[int],
    device: torch.device,
) -> Batch:
    """The rows at some positions; loss_mask is True at response tokens."""
    return mark_from(
        [sequences[p] for p in positions], [prompt_lengths[p] for p in positions], device
    )
