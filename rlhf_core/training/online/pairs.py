"""Pairs of a rollout with two replies to each prompt, and what DPO's loss makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_core.losses.reductions import Metrics

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Metrics]]
"""Log-probabilities (n,) nats of chosen and rejected replies, of policy and reference -> the mean
loss over the pairs, and its metrics."""


class Pairs(NamedTuple):
    """n pairs of the replies of a rollout."""

    chosen: Tensor  # (n,) indices of the better replies
    rejected: Tensor  # (n,) of the worse ones
    ties: float  # share of the prompts whose replies are too close to be a pair
    masked: float = 0.0  # share of the others, of which a reply is not trained on


def pick(scores: Tensor, min_margin: float, trained: Tensor) -> Pairs:
    """The better and the worse reply to each prompt.

    Args:
        scores: (B,); replies 2 i and 2 i + 1 answer prompt i.
        min_margin: least difference; equal scores never make a pair.
        trained: (B,) bool, whether a reply is in the loss. A pair needs both: one reply alone would
            rise, or fall, without anything that it is compared with.
    """
    first, second = scores.view(-1, 2).unbind(1)  # (B/2,) each
    apart = (first - second).abs()
    far = (apart > 0) & (apart >= min_margin)
    both = trained.view(-1, 2).all(dim=1)
    kept = (far & both).nonzero().squeeze(1)  # (n,)
    worse = (first < second).long()[kept]  # 1 where the second reply is the better one
    ties = 1.0 - int(far.sum()) / len(first)
    masked = int((far & ~both).sum()) / len(first)
    return Pairs(2 * kept + worse, 2 * kept + 1 - worse, ties, masked)


def reply_weights(
    logps: Tensor, ref_logps: Tensor, pairs: Pairs, loss: Loss
) -> tuple[Tensor, dict[str, float]]:
    """How far each reply's log-probability is to rise, and the loss.

    A loss of pairs depends on the policy through the log-probability of each reply alone. So its
    gradient is the sum over the replies of (d loss / d log-probability) times that one's gradient,
    and a reply can be trained without the other one of its pair in the same pass.

    Args:
        logps, ref_logps: (B,) of each reply (nats, sums over its tokens).

    Returns:
        - d loss / d logps (B,), 0 for ties; and the loss with its metrics, without pairs {}.
    """
    weights = torch.zeros_like(logps)
    if len(pairs.chosen) == 0:
        return weights, {}
    own = logps.detach().double().requires_grad_()
    ref = ref_logps.double()
    value, metrics = loss(
        own[pairs.chosen], own[pairs.rejected], ref[pairs.chosen], ref[pairs.rejected]
    )
    (gradient,) = torch.autograd.grad(value, own)
    found = {"loss": float(value.detach()), **{k: float(v) for k, v in metrics.items()}}
    return -gradient.to(weights.dtype), found
