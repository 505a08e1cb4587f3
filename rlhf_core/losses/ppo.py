"""Losses of PPO and estimates of the KL divergence. Conventions: `rlhf_core.losses`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhf_core.losses.reductions import (
    Denominator,
    Metrics,
    check_same_shape,
    masked_sum,
    token_count,
    upcast,
)
from rlhf_core.losses.surrogate import Objective, surrogate

KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: KLEstimator = "k1") -> Tensor:
    """Per-token estimates of KL(policy || reference) from the policy's own samples (nats).

    John Schulman, "Approximating KL divergence": k1 = logprobs - ref_logprobs (unbiased, may be
    negative), k2 = k1^2 / 2 (biased, low variance), k3 = exp(-k1) - 1 + k1 (unbiased, never
    negative). Takes no mask: garbage at padded positions stays garbage.

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
    objective: Objective = "clip",
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    denominator: Denominator = None,
) -> tuple[Tensor, Metrics]:
    """Mean over the tokens of a surrogate, by default the clipped one of PPO.

    Args:
        logprobs, old_logprobs, advantages: (B,T); only ``logprobs`` receives a gradient.
        mask: (B,T) bool.
        objective, clip_range, clip_range_high, dual_clip: see `surrogate`.
        denominator: real tokens of the global batch.

    Returns:
        The loss, and ``clip_fraction`` (tokens whose gradient the clip stops, ``cispo``: whose
        weight it caps), of which ``clip_fraction_low``, ``clip_fraction_high`` and, with dual_clip,
        ``dual_clip_fraction``; ``approx_kl`` (k3 of KL(old || new), nats), ``ratio_mean``,
        ``ratio_max`` (0 where no token is real).
    """
    check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    zero = torch.zeros((), device=logprobs.device)
    logprobs = torch.where(mask, upcast(logprobs), zero)  # (B,T)
    old_logprobs = torch.where(mask, upcast(old_logprobs.detach()), zero)  # (B,T)
    advantages = torch.where(mask, upcast(advantages.detach()), zero)  # (B,T)
    per_token, low, high, dual = surrogate(
        logprobs, old_logprobs, advantages, mask, objective, clip_range, clip_range_high, dual_clip
    )
    count = token_count(mask, denominator)
    loss = masked_sum(per_token, mask) / count
    ratio = (logprobs.detach() - old_logprobs).exp()  # (B,T)
    k3 = kl_estimate(old_logprobs, logprobs.detach(), "k3")  # (B,T)
    stopped = low | high if dual is None else low | high | dual
    fractions = {"clip_fraction": stopped, "clip_fraction_low": low, "clip_fraction_high": high}
    if dual is not None:
        fractions["dual_clip_fraction"] = dual
    metrics = {name: masked_sum(x.float(), mask) / count for name, x in fractions.items()}
    metrics |= {
        "approx_kl": masked_sum(k3, mask) / count,
        "ratio_mean": masked_sum(ratio, mask) / count,
        "ratio_max": torch.where(mask, ratio, zero).max() if mask.numel() else zero,
    }
    return loss, metrics


def kl_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    kind: KLEstimator,
    weights: Tensor | float,
    *,
    corrected: bool = False,
) -> Tensor:
    """The KL to the reference as a term of the loss, before its coefficient (nats).

    What counts is the gradient, not the value (arXiv 2510.01555). On replies of the policy itself,
    that of k2 is the KL's; that of k3 is its first-order approximation; that of k1 is 0 on average.

    Args:
        logprobs, old_logprobs, ref_logprobs: (B,T); only ``logprobs`` receives a gradient.
        mask: (B,T) bool. weights: of the tokens, (B,1), or one number.
        corrected: multiply by the ratio exp(logprobs - old_logprobs). The gradient of k1 and of k3
            is then the KL's, also after updates (DeepSeek-V3.2, arXiv 2512.02556, section 3.1).

    Returns:
        The weighted sum over the tokens, a scalar.
    """
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask)
    zero = torch.zeros((), device=logprobs.device)
    logprobs = torch.where(mask, logprobs, zero)  # (B,T)
    per_token = kl_estimate(logprobs, torch.where(mask, ref_logprobs.detach(), zero), kind)  # (B,T)
    if corrected:
        old_logprobs = torch.where(mask, old_logprobs.detach(), zero)  # (B,T)
        per_token = per_token * (upcast(logprobs) - upcast(old_logprobs)).exp()
    return masked_sum(per_token * weights, mask)


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
