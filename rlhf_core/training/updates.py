"""One optimizer step of a stage that trains on a data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from rlhf_core.errors import NonFinite
from rlhf_core.runtime.distributed import Group
from rlhf_core.training.checkpoint import Checkpointer
from rlhf_core.training.nonfinite import failure
from rlhf_core.training.reading import detached, read_all
from rlhf_core.training.strategy import Strategy

Loss = Callable[[list[int]], tuple[Tensor, Mapping[str, float | Tensor]]]
"""Indices in the global batch of a micro-batch's rows -> the micro-batch's share of the loss, and
of metrics that sum over micro-batches and ranks."""


def update_on_batch(
    strategy: Strategy,
    checkpointer: Checkpointer,
    step: int,
    rows: Sequence[Mapping[str, Any]],
    micro_batches: Sequence[list[int]],
    loss: Loss,
) -> dict[str, float]:
    """Forward and backward over this rank's micro-batches, then clip and update. Every rank calls.

    Args:
        step: from 0. rows: the global batch.
        micro_batches: indices in it of the rows of each of this rank's micro-batches.

    Returns:
        Of the global batch: loss, the loss's metrics and those of `Strategy.step_metrics`.

    Raises:
        NonFinite: the loss or a gradient is NaN or infinite; the batch is saved.
    """
    found = []
    try:
        for i, indices in enumerate(micro_batches):
            with strategy.micro_batch(last=i == len(micro_batches) - 1):
                total, metrics = loss(indices)
                strategy.backward(total)
            found.append(detached({"loss": total, **metrics}))
        shares = read_all(found)
        strategy.step()
    except NonFinite as error:
        last = len(micro_batches) - 1 if error.micro_batch is None else error.micro_batch
        raise failure(error, checkpointer, step + 1, rows, micro_batches[last]) from error
    return add_up(shares, strategy.group) | strategy.step_metrics()


def add_up(shares: Sequence[Mapping[str, float]], group: Group) -> dict[str, float]:
    """Sums over the micro-batches of all ranks. Every rank calls, with the same names."""
    own: dict[str, float] = {}
    for share in shares:
        own = {name: own.get(name, 0.0) + value for name, value in share.items()}
    return dict(zip(own, group.sum(list(own.values())).tolist(), strict=True))
