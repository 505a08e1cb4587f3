"""Losses of GRPO and RLOO. Conventions: `rlhf_core.losses`."""

from __future__ import annotations

from torch import Tensor

from rlhf_core.losses.ppo import KLEstimator, kl_loss, ppo_policy_loss
from rlhf_core.losses.reductions import Average, Metrics, averaging_weights, sequence_logps
from rlhf_core.losses.surrogate import Objective


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float,
    kl_coef: float,
    *,
    replies: float,
    tokens: float,
    average: Average = "seq-mean-token-mean",
    horizon: int | None = None,
    objective: Objective = "clip",
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    kl_estimator: KLEstimator = "k3",
    kl_correction: bool = False,
) -> tuple[Tensor, Metrics]:
    """A surrogate with the KL to the reference as a term (GRPO, arXiv 2402.03300, eq. 3).

    By default per token max(-r A, -clip(r) A) + kl_coef k3(logprobs, ref), averaged over each
    reply's tokens and then over replies.

    Args:
        logprobs, old_logprobs, ref_logprobs: (B,T); only ``logprobs`` receives a gradient. Without
            a reference (None) there is no KL.
        advantages: (B,), one for all tokens of a reply, or (B,T). mask: (B,T) bool.
        replies, tokens: numbers of the global batch, by which the sums are divided.
        average, horizon: see `averaging_weights`.
        objective, clip_range, clip_range_high, dual_clip: see `surrogate`.
        kl_estimator, kl_correction: see `kl_loss`.

    Returns:
        The loss, and per token of the global batch the fractions of `ppo_policy_loss` and
        ``approx_kl`` (k3 of KL(old || new), nats); ``kl_loss`` (KL(new || reference), nats,
        averaged as the loss is).
    """
    weights = averaging_weights(mask, average, replies=replies, tokens=tokens, horizon=horizon)
    # A positive factor on the advantage is a factor on the token's loss.
    columns = advantages if advantages.dim() == 2 else advantages.unsqueeze(1)  # (B,T) or (B,1)
    weighted = (columns * weights).expand(mask.shape)  # (B,T)
    loss, metrics = ppo_policy_loss(
        logprobs, old_logprobs, weighted, mask, clip_range, objective=objective,
        clip_range_high=clip_range_high, dual_clip=dual_clip, denominator=1.0,
    )  # fmt: skip
    shown = {name: x / tokens for name, x in metrics.items() if not name.startswith("ratio")}
    if ref_logprobs is None:
        return loss, shown
    kl = kl_loss(
        logprobs, old_logprobs, ref_logprobs, mask, kl_estimator, weights, corrected=kl_correction
    )
    return loss + kl_coef * kl, shown | {"kl_loss": kl.detach()}


def rloo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float,
    *,
    replies: float,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
) -> tuple[Tensor, Metrics]:
    """REINFORCE on whole replies: a reply is one action (RLOO, arXiv 2402.14740, section 3).

    Per reply max(-r A, -clip(r) A), r = exp(sum of logprobs - old). In a rollout's first update r
    is 1, and the gradient is that of -A log p(reply).

    Args:
        logprobs, old_logprobs: (B,T); only ``logprobs`` receives a gradient.
        advantages: (B,). mask: (B,T) bool. replies: of the global batch.
        clip_range, clip_range_high, dual_clip: of the ratio of a reply, see `surrogate`.

    Returns:
        The loss, and the fractions of `ppo_policy_loss`, of replies.
    """
    new = sequence_logps(logprobs, mask).unsqueeze(1)  # (B,1)
    old = sequence_logps(old_logprobs.detach(), mask).unsqueeze(1)  # (B,1)
    loss, metrics = ppo_policy_loss(
        new, old, advantages.unsqueeze(1), mask.any(dim=1, keepdim=True), clip_range,
        clip_range_high=clip_range_high, dual_clip=dual_clip, denominator=replies,
    )  # fmt: skip
    return loss, {name: x for name, x in metrics.items() if "fraction" in name}
