"""A rollout's replies as minibatches and micro-batches, by the indices of the replies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from rlhf_core.jobs import OnlineJob
from rlhf_core.nn.padding import Batch, batch_on, mark_from, pad_right
from rlhf_core.system.seeds import derive_seed
from rlhf_core.training.batching import split_batch
from rlhf_core.training.strategy import Strategy


class Update(NamedTuple):
    """One optimizer step on a minibatch of a rollout."""

    epoch: int
    minibatch: int  # index in `split_minibatches`
    number: int  # since the stage began


def split_minibatches(replies: int, minibatches: int) -> list[list[int]]:
    """Indices of the replies of each minibatch, dealt out in turn."""
    return [list(range(i, replies, minibatches)) for i in range(minibatches)]


def update_order(seed: int, step: int, epochs: int, minibatches: int) -> Iterator[Update]:
    """The updates of a rollout: the first epoch in order, later ones shuffled."""
    for epoch in range(epochs):
        order = range(minibatches)
        if epoch > 0:
            generator = np.random.default_rng(derive_seed(seed, step, epoch))
            order = generator.permutation(minibatches).tolist()
        for minibatch in order:
            yield Update(epoch, minibatch, (step * epochs + epoch) * minibatches + minibatch)


def micro_batches(
    job: OnlineJob, strategy: Strategy, sequences: Sequence[list[int]], minibatches: list[list[int]]
) -> list[list[int]]:
    """Indices of the replies of this rank's micro-batches, minibatch after minibatch."""
    result = []
    for minibatch in minibatches:
        for part in split_batch(
            [len(sequences[i]) for i in minibatch],
            strategy.group, job.resources.micro_batch_size, strategy.padding,
        ):  # fmt: skip
            result.append([minibatch[i] for i in part])
    return result


def collate_responses(
    sequences: Sequence[list[int]],
    prompt_lengths: Sequence[int],
    indices: Sequence[int],
    device: torch.device,
    trained: Sequence[Sequence[bool]] | None = None,
) -> Batch:
    """Some of the sequences, with their responses in the loss mask.

    Args:
        trained: of each sequence, whether the policy sampled each token of its response; None: all.
    """
    rows, starts = [sequences[i] for i in indices], [prompt_lengths[i] for i in indices]
    if trained is None:
        return mark_from(rows, starts, device)
    input_ids, mask = pad_right(rows)
    marks = [[0] * start + list(trained[i]) for i, start in zip(indices, starts, strict=True)]
    return batch_on(device, input_ids, mask, pad_right(marks)[0].bool())
