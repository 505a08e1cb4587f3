"""Losses as pure functions: tensors in, ``(loss, metrics)`` out.

Conventions, the same in every function:

* B sequences (or pairs), T response positions. A mask is bool, True is a real token.
* Log-probabilities are in nats and at the sampling temperature.
* Half-precision inputs are raised to fp32 first, so every loss is finite in bf16 and fp16.
* What stands in padded places (NaN, inf, garbage) reaches neither the loss nor a gradient.
* ``denominator``: a loss is a mean over the real tokens (or pairs) of the *global* batch. Pass
  the global count and the losses of all micro-batches and ranks *sum* to that mean; None means
  "this call is the whole batch". Metrics that are means share the denominator, so they sum too;
  metrics whose name ends in ``_max`` combine by maximum.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_core.preference_losses import dpo_loss, ipo_loss, kto_loss, orpo_odds_loss, simpo_loss
from rlhf_core.reductions import (
    Denominator,
    Metrics,
    check_same_shape,
    masked_mean,
    masked_sum,
    pair_metrics,
    row_count,
    sequence_logps,
    token_count,
    upcast,
)

__all__ = [
    "Denominator", "Metrics", "check_same_shape", "dpo_loss", "ipo_loss", "kl_estimate", "kto_loss",
    "masked_mean", "masked_sum", "orpo_odds_loss", "pairwise_loss", "ppo_policy_loss",
    "ppo_value_loss", "sequence_logps", "sft_loss", "simpo_loss", "upcast",
]  # fmt: skip


# ------------------------------------------------------------------- supervised, reward model
def sft_loss(
    logprobs: Tensor, mask: Tensor, *, denominator: Denominator = None
) -> tuple[Tensor, Metrics]:
    """Cross-entropy of the trained tokens: mean of -logprobs over the mask (nats per token).

    Args:
        logprobs: (B,T) log-probability of each label. mask: (B,T) bool.
        denominator: trained tokens of the global batch.
    """
    check_same_shape(logprobs=logprobs, mask=mask)
    loss = masked_mean(-upcast(logprobs), mask, denominator)
    return loss, {"nll": loss.detach()}


def pairwise_loss(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    kind: Literal["log_sig", "log_exp"] = "log_sig",
    *,
    denominator: Denominator = None,
) -> tuple[Tensor, Metrics]:
    """Bradley-Terry loss of a reward model (InstructGPT, arXiv 2203.02155, equation 1).

    ``log_sig`` is -log sigmoid(c - r), ``log_exp`` is log(1 + exp(r - c)): two spellings of one
    function, both computed as softplus(r - c).

    Args:
        chosen_scores: (B,). rejected_scores: (B,).
        denominator: pairs of the global batch.

    Returns:
        The loss, and ``accuracy`` (ties count half) and ``margin`` (mean of c - r).
    """
    if kind not in ("log_sig", "log_exp"):
        raise ValueError(f"found kind {kind!r}, needed 'log_sig' or 'log_exp'")
    check_same_shape(chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    margin = upcast(chosen_scores) - upcast(rejected_scores)  # (B,)
    count = row_count(margin, denominator)
    return F.softplus(-margin).sum() / count, pair_metrics(margin, count)


# ---------------------------------------------------------------------------------------- PPO
def kl_estimate(
    logprobs: Tensor, ref_logprobs: Tensor, kind: Literal["k1", "k2", "k3"] = "k1"
) -> Tensor:
    """Per-token estimates of KL(policy || reference) from the policy's own samples (nats).

    John Schulman, "Approximating KL divergence": k1 = logprobs - ref_logprobs (unbiased, may be
    negative), k2 = k1^2 / 2 (biased, low variance), k3 = exp(-k1) - 1 + k1 (unbiased, never
    negative). Takes no mask: padded places come out as garbage if they went in as garbage.

    Args:
        logprobs: (B,T) of the policy that sampled. ref_logprobs: (B,T) of the reference.

    Returns:
        (B,T).
    """
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    k1 = upcast(logprobs) - upcast(ref_logprobs)  # (B,T)
    if kind == "k1":
        return k1
    if kind == "k2":
        return k1.square() / 2
    if kind == "k3":
        return torch.expm1(-k1) + k1
    raise ValueError(f"found kind {kind!r}, needed 'k1', 'k2' or 'k3'")


def ppo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float,
    *,
    denominator: Denominator = None,
) -> tuple[Tensor, Metrics]:
    """Clipped surrogate objective (PPO, arXiv 1707.06347, equation 7), negated.

    Per token max(-r A, -clip(r, 1 - clip_range, 1 + clip_range) A), r = exp(logprobs - old).

    Args:
        logprobs, old_logprobs, advantages: (B,T); only ``logprobs`` receives a gradient.
        mask: (B,T) bool. denominator: real tokens of the global batch.

    Returns:
        The loss, and ``clip_fraction`` (tokens whose gradient the clip stops), ``approx_kl``
        (k3 of KL(old || new), nats), ``ratio_mean``, ``ratio_max`` (0 where no token is real).
    """
    check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    zero = torch.zeros((), device=logprobs.device)
    logprobs = torch.where(mask, upcast(logprobs), zero)  # (B,T)
    old_logprobs = torch.where(mask, upcast(old_logprobs.detach()), zero)  # (B,T)
    advantages = torch.where(mask, upcast(advantages.detach()), zero)  # (B,T)
    log_ratio = logprobs - old_logprobs  # (B,T)
    ratio = log_ratio.detach().exp()  # (B,T)
    low, high = 1.0 - clip_range, 1.0 + clip_range
    clipped = torch.where(advantages > 0, ratio > high, (advantages < 0) & (ratio < low))
    # The branch is chosen before exp: through torch.maximum a ratio that overflowed would send
    # back 0 * inf = NaN from a token that the clip has stopped.
    free_ratio = torch.where(clipped, zero, log_ratio).exp()  # (B,T)
    per_token = -advantages * torch.where(clipped, ratio.clamp(low, high), free_ratio)  # (B,T)
    count = token_count(mask, denominator)
    loss = masked_sum(per_token, mask) / count
    k3 = kl_estimate(old_logprobs, logprobs.detach(), "k3")  # (B,T)
    metrics = {
        "clip_fraction": masked_sum(clipped.float(), mask) / count,
        "approx_kl": masked_sum(k3, mask) / count,
        "ratio_mean": masked_sum(ratio, mask) / count,
        "ratio_max": torch.where(mask, ratio, zero).max() if mask.numel() else zero,
    }
    return loss, metrics


def ppo_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    value_clip_range: float | None,
    *,
    denominator: Denominator = None,
) -> tuple[Tensor, Metrics]:
    """Clipped squared error of the critic ("The N+ implementation details", arXiv 2403.17031).

    Per token max((v - R)^2, (old + clip(v - old, +-value_clip_range) - R)^2) / 2.

    Args:
        values, old_values, returns: (B,T); only ``values`` receives a gradient.
        mask: (B,T) bool. value_clip_range: None does not clip.
        denominator: real tokens of the global batch.

    Returns:
        The loss, and ``clip_fraction`` (tokens where the clipped error is the larger),
        ``value_mean``, ``return_mean`` and ``squared_error`` (unclipped, without the 1/2).
    """
    check_same_shape(values=values, old_values=old_values, returns=returns, mask=mask)
    zero = torch.zeros((), device=values.device)
    values = torch.where(mask, upcast(values), zero)  # (B,T)
    old_values = torch.where(mask, upcast(old_values.detach()), zero)  # (B,T)
    returns = torch.where(mask, upcast(returns.detach()), zero)  # (B,T)
    error = (values - returns).square()  # (B,T)
    worst, clipped = error, torch.zeros_like(mask)
    if value_clip_range is not None:
        near = old_values + (values - old_values).clamp(-value_clip_range, value_clip_range)
        clipped_error = (near - returns).square()  # (B,T)
        worst, clipped = torch.maximum(error, clipped_error), clipped_error > error
    count = token_count(mask, denominator)
    metrics = {
        "clip_fraction": masked_sum(clipped.float(), mask) / count,
        "value_mean": values.detach().sum() / count,
        "return_mean": returns.sum() / count,
        "squared_error": error.detach().sum() / count,
    }
    return 0.5 * masked_sum(worst, mask) / count, metrics
