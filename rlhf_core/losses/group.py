"""Losses of GRPO and RLOO. Conventions: `rlhf_core.losses`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhf_core.losses.ppo import kl_estimate, ppo_policy_loss
from rlhf_core.losses.reductions import Metrics, check_same_shape, masked_sum, sequence_logps


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float,
    kl_coef: float,
    *,
    replies: float,
    tokens: float,
    average: Literal["reply", "token"] = "reply",
) -> tuple[Tensor, Metrics]:
    """Clipped surrogate with the KL to the reference as a term (GRPO, arXiv 2402.03300, eq. 3).

    Per token max(-r A, -clip(r) A) + kl_coef k3(logprobs, ref); ``reply`` takes the mean over each
    reply's tokens and then over replies, ``token`` the mean over all tokens (arXiv 2503.20783 up to
    a constant).

    Args:
        logprobs, old_logprobs, ref_logprobs: (B,T); only ``logprobs`` receives a gradient.
        advantages: (B,), one for all tokens of a reply, or (B,T). mask: (B,T) bool.
        replies, tokens: numbers of the global batch, by which the sums are divided.

    Returns:
        The loss, and per token of the global batch ``clip_fraction``, ``approx_kl`` (k3 of
        KL(old || new), nats) and ``kl_loss`` (k3 of KL(new || reference), nats, averaged as the
        loss is).
    """
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask)
    zero = torch.zeros((), device=logprobs.device)
    columns = advantages if advantages.dim() == 2 else advantages.unsqueeze(1)  # (B,T) or (B,1)
    if average == "reply":
        weights = 1.0 / mask.sum(dim=1, keepdim=True).clamp(min=1).float() / replies  # (B,1)
    else:
        weights = torch.full_like(columns[:, :1], 1.0 / tokens)  # (B,1)
    # A positive factor on the advantage is a factor on the token's loss.
    weighted = (columns * weights).expand(mask.shape)  # (B,T)
    surrogate, metrics = ppo_policy_loss(
        logprobs, old_logprobs, weighted, mask, clip_range, denominator=1.0
    )
    k3 = kl_estimate(
        torch.where(mask, logprobs, zero), torch.where(mask, ref_logprobs.detach(), zero), "k3"
    )  # (B,T)
    kl = masked_sum(k3 * weights, mask)
    per_token = {name: metrics[name] / tokens for name in ("clip_fraction", "approx_kl")}
    return surrogate + kl_coef * kl, per_token | {"kl_loss": kl.detach()}


def rloo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float,
    *,
    replies: float,
) -> tuple[Tensor, Metrics]:
    """REINFORCE on whole replies: a reply is one action (RLOO, arXiv 2402.14740, section 3).

    Per reply max(-r A, -clip(r) A), r = exp(sum of logprobs - old). In a rollout's first update r
    is 1, and the gradient is that of -A log p(reply).

    Args:
        logprobs, old_logprobs: (B,T); only ``logprobs`` receives a gradient.
        advantages: (B,). mask: (B,T) bool. replies: of the global batch.

    Returns:
        The loss, and ``clip_fraction`` (of replies).
    """
    new = sequence_logps(logprobs, mask).unsqueeze(1)  # (B,1)
    old = sequence_logps(old_logprobs.detach(), mask).unsqueeze(1)  # (B,1)
    loss, metrics = ppo_policy_loss(
        new, old, advantages.unsqueeze(1), mask.any(dim=1, keepdim=True), clip_range,
        denominator=replies,
    )  # fmt: skip
    return loss, {"clip_fraction": metrics["clip_fraction"]}
