"""Scores of sequences by a reward model, computed by all ranks together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_core.nn.ensemble import RewardEnsemble
from rlhf_core.nn.modules import ScalarModel
from rlhf_core.nn.padding import rows_on
from rlhf_core.runtime.distributed import Group
from rlhf_core.training.batching import scoring_passes
from rlhf_core.training.reading import read_rows
from rlhf_core.training.strategy import Strategy


@torch.no_grad()
def score_sequences(
    module: ScalarModel | RewardEnsemble,
    sequences: Sequence[Sequence[int]],
    group: Group,
    micro: int,
) -> list[float]:
    """Scores of sequences, in their order, computed by all ranks together.

    Args:
        micro: sequences in one pass on one rank.
    """
    found = []
    lengths = [len(s) for s in sequences]
    for positions, counts in scoring_passes(lengths, group, micro):
        scores = module(*rows_on(group.device, [sequences[p] for p in positions]))
        if counts:
            found.append((positions, scores))
    return group.in_order(read_rows(found))


def score_all(
    module: ScalarModel | RewardEnsemble,
    sequences: Sequence[Sequence[int]],
    strategy: Strategy,
    micro: int,
) -> Tensor:
    """Scores (n,) fp64 of sequences, in their order, computed by all ranks together."""
    with strategy.autocast():
        scores = score_sequences(module, sequences, strategy.group, micro)
    return torch.tensor(scores, dtype=torch.float64)
