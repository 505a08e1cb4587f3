"""The KL to the reference: its weight, which may follow the KL that it leads to, and its place."""

from __future__ import annotations

from torch import Tensor

from rlhf_core.jobs import PPOJob, ReinforcePPJob, RLOOJob
from rlhf_core.losses.ppo import kl_loss
from rlhf_core.losses.reductions import Metrics
from rlhf_core.training.online.stage import OnlineStage
from rlhf_core.training.online.updates import MicroBatch

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


def kl_term(
    job: PPOJob | RLOOJob | ReinforcePPJob, kl_coef: float, micro_batch: MicroBatch, count: float
) -> tuple[Tensor | float, Metrics]:
    """What the KL adds to the loss: nothing where `kl_in` is reward, or nobody asks for it.

    Args:
        count: what the sum over the tokens is divided by.

    Returns:
        The term, and ``kl_loss``, the same without its coefficient.
    """
    if job.kl_in == "reward" or micro_batch.ref_logprobs is None:
        return 0.0, {}
    kl = kl_loss(
        micro_batch.logprobs, micro_batch.old_logprobs, micro_batch.ref_logprobs,
        micro_batch.loss_mask, job.kl_kind, 1.0 / count, corrected=job.kl_correction,
    )  # fmt: skip
    return kl_coef * kl, {"kl_loss": kl.detach()}
