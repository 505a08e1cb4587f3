"""The weight of the KL to the reference, which may follow the KL that it leads to."""

from __future__ import annotations

from rlhf_core.training.online.stage import OnlineStage

LARGEST_ERROR = 0.2  # relative distance from the target beyond which the change is the same


def kl_coefficient(stage: OnlineStage) -> float:
    """The coefficient of the next step, the same on every rank. Every rank calls.

    It follows from the last rollout's line in metrics.jsonl, which every checkpoint holds.
    """
    job, context = stage.job, stage.context
    if job.kl_target is None:
        return job.kl_coef
    coefficient = job.kl_coef
    if context.main:
        rollouts = [line for line in context.read_metrics() if "kl_coef" in line]
        if rollouts:
            last = rollouts[-1]
            coefficient = next_coefficient(
                last["kl_coef"], last["kl"], job.kl_target, job.kl_horizon
            )
    return float(stage.strategy.group.broadcast(coefficient))


def next_coefficient(coefficient: float, kl: float, target: float, horizon: float) -> float:
    """The proportional controller of Ziegler et al. (arXiv 1909.08593, section 2.2), in which
    1 / horizon is K_beta, 0.1.

    Args:
        kl: of the last rollout, which was trained on with the coefficient; like target in nats per
            reply.
    """
    error = min(max(kl / target - 1.0, -LARGEST_ERROR), LARGEST_ERROR)
    return coefficient * (1.0 + error / horizon)
