"""Order of the data, micro-batches and padding. Stateless: everything follows from (seed, step)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from rlhf_core.data.dataset.sampling import Sampling
from rlhf_core.runtime.distributed import Group
from rlhf_core.system.seeds import derive_seed


class Sampled(Protocol):
    """Rows that epochs are drawn from."""

    def __len__(self) -> int: ...

    @property
    def sampling(self) -> Sampling | None:
        """How an epoch is drawn; None: all rows in random order."""


def steps_in(rows: int | Sampled, batch_size: int, epochs: int, max_steps: int | None) -> int:
    """Optimizer steps of a stage: whole batches only, at least one per epoch.

    With fewer rows than a batch, rows are repeated to fill it.

    Args:
        rows: their number, or the data set.
    """
    steps = max(1, size_of(drawn_from(rows)) // batch_size) * epochs
    return steps if max_steps is None else min(steps, max_steps)


def batch_rows(rows: int | Sampled, batch_size: int, step: int, seed: int) -> list[int]:
    """Row numbers of the global batch of a step (from 0).

    Each epoch is a permutation of its own, or drawn as the data set says: a function of (seed,
    epoch) alone. The rows that do not fill the last batch of an epoch are left out of that epoch,
    also of a curriculum at random.

    Args:
        rows: their number, or the data set.
    """
    drawn = drawn_from(rows)
    per_epoch = max(1, size_of(drawn) // batch_size)
    epoch, position = divmod(step, per_epoch)
    order = epoch_order(drawn, batch_size, epoch, seed)
    return [int(row) for row in order[position * batch_size : (position + 1) * batch_size]]


def drawn_from(rows: int | Sampled) -> int | Sampling:
    """What an epoch is drawn from: a number of rows, or a plan."""
    if isinstance(rows, int):
        return rows
    return len(rows) if rows.sampling is None else rows.sampling


def size_of(drawn: int | Sampling) -> int:
    return drawn if isinstance(drawn, int) else len(drawn)


@functools.lru_cache(maxsize=4)  # a million rows take 8 MB; with ptx there are two orders
def epoch_order(drawn: int | Sampling, batch_size: int, epoch: int, seed: int) -> np.ndarray:
    """Row numbers in the order of an epoch, or of several if it is shorter than a batch; at least
    those of its whole batches.

    Args:
        drawn: number of rows, of which an epoch is a permutation; or how it is drawn.
    """
    size = size_of(drawn)
    parts = range(-(-batch_size // size))
    if isinstance(drawn, int):
        generators = (np.random.default_rng(derive_seed(seed, epoch, part)) for part in parts)
        return np.concatenate([generator.permutation(drawn) for generator in generators])
    used = max(1, size // batch_size) * batch_size
    return np.concatenate(
        [drawn.epoch(epoch * len(parts) + part, seed, used - part * size) for part in parts]
    )


def split_batch(
    lengths: Sequence[int], group: Group, micro_batch_size: int, padding: float = 1.0
) -> list[list[int]]:
    """This rank's micro-batches: positions in the global batch, longest first.

    Sorting by length makes the rows of a micro-batch nearly equally long. The cuts between
    micro-batches minimise padding plus `pass_cost`; no micro-batch has more tokens than
    `micro_batch_size` rows of the greatest length. Dealing rows out in turn gives every rank the
    same number of micro-batches of similar length. The longest come first, so that a batch that
    does not fit into memory fails at once.

    Args:
        lengths: tokens of each row of the global batch; as many for each rank of the group.
        micro_batch_size: rows of the greatest length; of shorter ones there may be more.
        padding: relative cost of a padding token, see `Strategy.padding`.
    """
    order = _longest_first(lengths)
    widths = [lengths[i] for i in order[:: group.size]]
    cuts = _cuts(widths, micro_batch_size, pass_cost(group.device), padding)
    return [mine for mine in _dealt(order, cuts, group.rank, group.size) if mine]


class Pass(NamedTuple):
    """A forward pass over some rows that are only scored."""

    rows: list[int]  # positions in the whole list
    counts: bool  # False: the rows are another rank's, and the result is left out


def scoring_passes(lengths: Sequence[int], group: Group, micro_batch_size: int) -> list[Pass]:
    """As `split_batch`, for any number of rows, and with as many passes on each rank: ranks that
    share their layers (fsdp2) would wait for one that runs a pass less. A rank that has no rows in
    the last pass repeats the shortest row."""
    order = _longest_first(lengths)
    widths = [lengths[i] for i in order[:: group.size]]
    dealt = _dealt(
        order, _cuts(widths, micro_batch_size, pass_cost(group.device), 1.0), group.rank, group.size
    )
    return [Pass(mine or order[-1:], bool(mine)) for mine in dealt]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def _dealt(
    order: Sequence[int], cuts: Iterable[tuple[int, int]], rank: int, world_size: int
) -> list[list[int]]:
    """A rank's rows of each window; windows count in rows per rank."""
    return [
        list(order[start * world_size : stop * world_size][rank::world_size])
        for start, stop in cuts
    ]


def pass_cost(device: torch.device) -> int:
    """Fixed cost of a forward and backward pass, in tokens that take as long on the device.

    Measured on CPUs: 20 to 60 (casting weights, adding up gradients, Python). On GPUs, which small
    passes leave idle, it is an estimate.
    """
    return 64 if device.type == "cpu" else 2048


def _cuts(widths: Sequence[int], rows: int, cost: float, padding: float) -> list[tuple[int, int]]:
    """Windows of a descending list that cover it at the lowest sum of their costs.

    A window costs its widths, `padding` for each position that pads them to its first width, and
    `cost`. Without `cost` it is at most `rows` times the list's first width. Solved as a shortest
    path, from left to right.
    """
    count = len(widths)
    if not count:
        return []
    budget = rows * max(1, widths[0])
    real = np.concatenate([[0], np.cumsum([max(1, w) for w in widths])])
    best = np.full(count + 1, np.inf)
    previous = np.zeros(count + 1, dtype=np.int64)
    best[0] = 0
    for start in range(count):
        width = max(1, widths[start])
        last = int(np.searchsorted(real, real[start] + budget, "right"))  # further is no window
        tokens = real[start + 1 : last] - real[start]
        tokens = tokens + padding * (np.arange(1, last - start) * width - tokens)
        tokens = tokens[tokens <= budget]
        sums = best[start] + tokens + cost
        ends = slice(start + 1, start + 1 + len(tokens))
        better = sums < best[ends]
        best[ends] = np.where(better, sums, best[ends])
        previous[ends] = np.where(better, start, previous[ends])
    cuts = [count]
    while cuts[-1]:
        cuts.append(int(previous[cuts[-1]]))
    return list(itertools.pairwise(reversed(cuts)))


def split_evenly(lengths: Sequence[int], rank: int, world_size: int, parts: int) -> list[list[int]]:
    """As `split_batch`, in a given number of micro-batches of equal size, give or take one row.

    Args:
        parts: no more than len(lengths) / world_size.
    """
    units = len(lengths) // world_size
    ends = [units * i // parts for i in range(parts + 1)]
    return _dealt(_longest_first(lengths), itertools.pairwise(ends), rank, world_size)


def learning_rate_scale(step: int, total: int, warmup_fraction: float, schedule: str) -> float:
    """Factor on the peak learning rate for a step (from 0): linear warm-up, then the schedule.

    The warm-up's first step is above 0 and its last is 1; cosine and linear reach 0 one step after
    the last, so that no step is wasted on a rate of 0.
    """
    warmup = round(warmup_fraction * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + float(np.cos(np.pi * progress)))
