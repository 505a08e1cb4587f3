"""Several reward models that score as one (arXiv 2310.02743).

What one reward model got wrong is seldom what all got wrong: where a policy has found an error,
members of different seeds disagree. k members, b sequences, S positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_core.jobs.ensemble import CombineSettings
from rlhf_core.nn.modules import ScalarModel
from rlhf_core.nn.padding import TokenIndex


def combine_scores(scores: Tensor, settings: CombineSettings) -> Tensor:
    """The members' scores (k, ...) of each sequence as one, see `CombineSettings`."""
    if settings.member_weights:
        weights = scores.new_tensor(settings.member_weights)  # (k,)
        return torch.tensordot(weights, scores, dims=1)
    if settings.combine == "min":
        return scores.amin(dim=0)
    mean = scores.mean(dim=0)
    if settings.combine == "mean":
        return mean
    return mean - settings.std_coef * disagreement(scores)


def disagreement(scores: Tensor) -> Tensor:
    """Standard deviation over the members of scores (k, ...): over all there are, so divided by k;
    0 for one member."""
    return scores.std(dim=0, correction=0)


class RewardEnsemble:
    """Frozen reward models of one vocabulary; one alone is an ensemble too.

    No module: each member is moved, sharded and shares layers by itself.
    """

    def __init__(self, members: Sequence[ScalarModel], settings: CombineSettings) -> None:
        self.members = tuple(members)
        self.settings = settings

    def each(self, input_ids: Tensor, mask: Tensor, index: TokenIndex | None = None) -> Tensor:
        """Scores (k,b) fp32 of each member; see `ScalarModel`."""
        return torch.stack([member(input_ids, mask, index) for member in self.members])

    def __call__(self, input_ids: Tensor, mask: Tensor, index: TokenIndex | None = None) -> Tensor:
        """Scores (b,) fp32 of all members together."""
        return combine_scores(self.each(input_ids, mask, index), self.settings)
