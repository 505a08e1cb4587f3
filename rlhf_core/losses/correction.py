"""Importance weights for replies that another policy than the trained one has sampled: an engine
that computes otherwise, or an older policy. Conventions: `rlhf_core.losses`.

Sources: truncated importance sampling (TIS; Ionides 2008, and Yao et al. 2025, "Your efficient RL
framework secretly brings you off-policy RL training"), masking of tokens (IcePop, arXiv 2510.18855)
and of sequences (MIS; Liu et al. 2025, "When speed kills stability"), a policy of its own for the
ratio that is clipped (decoupled PPO, arXiv 2110.00641).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from rlhf_core.losses.ppo import kl_estimate
from rlhf_core.losses.reductions import Metrics, check_same_shape, masked_sum, upcast

LARGEST_LOG = 20.0  # a log-ratio beyond it is taken for it: exp of it is finite in any precision

Level = Literal["token", "sequence"]


def importance_ratios(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, level: Level
) -> Tensor:
    """Probability of what was sampled under the trained policy, over that of its sampler.

    Args:
        old_logprobs: (B,T) of the trained policy before the rollout's updates, nats.
        rollout_logprobs: (B,T) of what sampled. mask: (B,T) bool, tokens that it sampled.
        level: "token" gives one ratio per token, "sequence" the product over a reply.

    Returns:
        (B,T), 1 where the mask is False, or (B,). Without a gradient.
    """
    check_same_shape(old_logprobs=old_logprobs, rollout_logprobs=rollout_logprobs, mask=mask)
    log_ratio = upcast(old_logprobs.detach()) - upcast(rollout_logprobs)  # (B,T)
    log_ratio = torch.where(mask, log_ratio, torch.zeros_like(log_ratio))
    if level == "sequence":
        log_ratio = log_ratio.sum(dim=1)  # (B,)
    return log_ratio.clamp(-LARGEST_LOG, LARGEST_LOG).exp()


def bounded_weights(
    ratios: Tensor,
    mode: Literal["truncate", "mask"],
    min_weight: float | None,
    max_weight: float | None,
) -> Tensor:
    """Weights from ratios of any shape: those beyond the bounds are set to the bound ("truncate"),
    or to 0 ("mask"). A bound of None is none."""
    if mode == "truncate":
        low, high = min_weight or 0.0, math.inf if max_weight is None else max_weight
        return ratios.clamp(low, high)
    outside = beyond(ratios, min_weight, max_weight)
    return torch.where(outside, torch.zeros_like(ratios), ratios)


def beyond(ratios: Tensor, min_weight: float | None, max_weight: float | None) -> Tensor:
    """Which ratios are outside the bounds (bool, same shape)."""
    outside = torch.zeros_like(ratios, dtype=torch.bool)
    if max_weight is not None:
        outside |= ratios > max_weight
    if min_weight is not None:
        outside |= ratios < min_weight
    return outside


def weighted(advantages: Tensor, weights: Tensor | None) -> Tensor:
    """Advantages times importance weights. A weight is not negative, so that it is a factor of the
    surrogate as well, whatever is clipped.

    Args:
        advantages: (B,T), or (B,). weights: (B,T), (B,), or None: all are 1.

    Returns:
        (B,), if both have one number per reply, else (B,T).
    """
    if weights is None:
        return advantages
    if advantages.dim() < weights.dim():
        return advantages.unsqueeze(1) * weights
    if weights.dim() < advantages.dim():
        return advantages * weights.unsqueeze(1)
    return advantages * weights


def sampler_divergence(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> Metrics:
    """How far the sampler is from the trained policy, over the real tokens of a rollout.

    Args:
        old_logprobs, rollout_logprobs: (B,T) nats. mask: (B,T) bool, not all False.

    Returns:
        ``kl``: KL(sampler || trained), k3, nats per token; ``chi2``: chi-squared divergence of the
        tokens, mean of the squared ratios less 1; ``gap_max``: largest |difference| in nats.
    """
    ratios = importance_ratios(old_logprobs, rollout_logprobs, mask, "token")  # (B,T)
    k3 = kl_estimate(rollout_logprobs, old_logprobs, "k3")  # (B,T)
    gap = upcast(old_logprobs) - upcast(rollout_logprobs)  # (B,T)
    tokens = mask.sum()
    return {
        "kl": masked_sum(k3, mask) / tokens,
        "chi2": masked_sum(ratios.square(), mask) / tokens - 1.0,
        "gap_max": torch.where(mask, gap.abs(), torch.zeros_like(gap)).max(),
    }


def weight_metrics(ratios: Tensor, weights: Tensor, mask: Tensor, outside: Tensor) -> Metrics:
    """What the weights of a rollout are like, over its tokens, or over its replies if they have
    one each.

    Args:
        ratios, weights: (B,T) or (B,). outside: the same, bool. mask: (B,T) bool, not all False.

    Returns:
        ``mean`` and ``max`` of the ratios before they were bounded, ``outside`` (share beyond the
        bounds), and ``ess``, the effective sample size over the number: (sum w)^2 / (n sum w^2),
        0 if all weights are.
    """
    real = mask if ratios.dim() == 2 else mask.any(dim=1)  # (B,T) or (B,)
    ratios, weights, outside = ratios[real], weights[real], outside[real]
    squares = weights.square().sum()
    ess = weights.sum().square() / (len(weights) * squares.clamp(min=1e-30))
    return {
        "mean": ratios.mean(),
        "max": ratios.max(),
        "outside": outside.float().mean(),
        "ess": ess,
    }
