"""The scores that an online algorithm learns from, out of the rewards of its replies."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rlhf_core.jobs import OnlineJob
from rlhf_core.losses.advantages import masked_whiten


def weighted_sum(components: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Sum (B,) fp32 of each reply's rewards, (B,) each, times their weights."""
    total = sum(weights[name] * reward.double() for name, reward in components.items())
    assert isinstance(total, Tensor), "there is at least one reward"
    return total.float()


def shape_scores(
    job: OnlineJob,
    components: Mapping[str, Tensor],
    weights: Mapping[str, float],
    finished: Tensor,
) -> Tensor:
    """What replies earn: the sum of the rewards, clipped and whitened as the job says, less the
    penalty for those that were cut.

    Without rewards the sum is 0: a judge then compares the replies.

    Whitening: (s - mean) / sqrt(var + 1e-8) over the global batch, which every rank has whole.

    Args:
        components: name -> (B,) of each reward. finished: (B,) bool, ended with an end of turn.

    Returns:
        (B,) fp32.
    """
    if job.score_clip is not None:
        model = components["model"].clamp(-job.score_clip, job.score_clip)
        components = {**components, "model": model}
    scores = weighted_sum(components, weights) if components else torch.zeros(len(finished))
    if job.score_whiten:
        scores = masked_whiten(scores, torch.ones_like(scores, dtype=torch.bool))
    return scores - job.missing_eos_penalty * (~finished).float()


def score_metrics(
    job: OnlineJob, components: Mapping[str, Tensor], disagreement: Tensor | None
) -> dict[str, float]:
    """Of a rollout: share of the replies whose reward model's score is beyond the clip, and mean
    standard deviation over the members of an ensemble.

    Args:
        disagreement: (B,) of the members; None for one reward model.
    """
    found = {}
    if job.score_clip is not None:
        beyond = components["model"].abs() > job.score_clip  # (B,)
        found["score_clipped"] = float(beyond.float().mean())
    if disagreement is not None:
        found["reward_model_std"] = float(disagreement.mean())
    return found


def member_means(job: OnlineJob, scores: Tensor) -> dict[str, float]:
    """Mean score (k,B) of each of several reward models that have weights: reward_model/1 and so
    on."""
    if not job.member_weights:
        return {}
    return {f"reward_model/{k}": float(of.mean()) for k, of in enumerate(scores, start=1)}
