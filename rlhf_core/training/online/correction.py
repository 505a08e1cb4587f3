"""Corrects the gap between what samples replies and what is trained on them.

B replies of a rollout (global), b rows of a micro-batch, T response positions.
"""

from __future__ import annotations

from torch import Tensor

from rlhf_core.jobs import OnlineJob, VllmRollout
from rlhf_core.losses.correction import (
    Level,
    beyond,
    bounded_weights,
    importance_ratios,
    sampler_divergence,
    weight_metrics,
)
from rlhf_core.training.online.experience import Experience


def correction_level(job: OnlineJob) -> Level:
    """Whether tokens or whole replies are weighted."""
    correction = job.correction
    assert correction is not None
    return correction.level or ("sequence" if job.one_action else "token")


def correction_weights(
    job: OnlineJob, old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor
) -> Tensor | None:
    """Importance weights of some replies, by which their surrogate is multiplied.

    Args:
        old_logprobs, rollout_logprobs: (b,T) nats. mask: (b,T) bool, tokens that were sampled.

    Returns:
        (b,T) or (b,), see `correction_level`; None where the job asks for no correction, or its
        loss takes none.
    """
    correction = job.correction
    if correction is None:
        return None
    ratios = importance_ratios(old_logprobs, rollout_logprobs, mask, correction_level(job))
    return bounded_weights(ratios, correction.mode, correction.min_weight, correction.max_weight)


def correction_metrics(job: OnlineJob, experience: Experience) -> dict[str, float]:
    """Of a rollout that vLLM or older weights have sampled, or that is corrected: how far its
    sampler is from the trained policy, and what the weights are like; see `losses.correction`."""
    correction, mask = job.correction, experience.loss_mask  # (B,T)
    if job.rollout.correction_in_force is None and not isinstance(job.rollout, VllmRollout):
        return {}
    old, sampler = experience.old_logprobs, experience.rollout_logprobs  # (B,T) each
    found = {f"rollout_{k}": v for k, v in sampler_divergence(old, sampler, mask).items()}
    if correction is not None:
        ratios = importance_ratios(old, sampler, mask, correction_level(job))
        bounds = correction.min_weight, correction.max_weight
        weights = bounded_weights(ratios, correction.mode, *bounds)
        shown = weight_metrics(ratios, weights, mask, beyond(ratios, *bounds))
        found |= {f"rollout_weight_{k}": v for k, v in shown.items()}
    return {name: float(value) for name, value in found.items()}
