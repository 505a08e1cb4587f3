"""RLOO (arXiv 2402.14740): REINFORCE on whole replies, each measured against its siblings.

A reply is one action; its reward is its score less kl_coef times its KL to the reference, its
baseline the mean reward of the other replies to the prompt. Deviation from the paper: the ratio of
a reply is clipped as in PPO, which in the first update of a rollout (the only one by default)
changes nothing.

B replies of a rollout (global), b rows of a micro-batch, T response positions.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from rlhf_core.jobs import RLOOJob
from rlhf_core.losses.advantages import group_advantages, token_rewards
from rlhf_core.losses.group import rloo_loss
from rlhf_core.losses.ppo import kl_estimate
from rlhf_core.losses.reductions import masked_sum
from rlhf_core.nn.modules import Actor
from rlhf_core.runtime.context import StageContext
from rlhf_core.store import Artifact
from rlhf_core.training.online.dynamic_sampling import sample_groups
from rlhf_core.training.online.experience import Targets, score
from rlhf_core.training.online.heldout import steps_left
from rlhf_core.training.online.kl_control import kl_coefficient, kl_term
from rlhf_core.training.online.report import flat_groups, report_and_save
from rlhf_core.training.online.stage import fetch_inputs, load_policy, prepare, publish
from rlhf_core.training.online.updates import MicroBatch, optimise
from rlhf_core.training.strategy import Strategy


def run(job: RLOOJob, context: StageContext) -> Artifact | None:
    """Sample, score, update; publish the policy. Rank 0 returns the artifact."""
    strategy = Strategy(job.resources, job.precision, job.max_grad_norm)
    inputs = fetch_inputs(job, context)
    actor = Actor(load_policy(job, inputs.source, strategy))
    stage = prepare(job, context, strategy, inputs, actor, {"": job.learning_rate})

    for step in steps_left(stage):
        # 1. Sample a group of replies to each prompt.
        rollout, resampled = sample_groups(stage, step)
        # 2. Score them: policy, reference, reward model, rules.
        defer = not job.kl_is_rewarded  # otherwise the rewards need the old log-probabilities
        experience, first_pass = score(stage, step, rollout, defer_old_logprobs=defer)
        # 3. Advantages: the reward, KL included, less the mean of the group's other replies.
        kl_coef = kl_coefficient(stage)
        rewards = token_rewards(
            experience.scores, experience.old_logprobs, experience.rewarded_from,
            experience.response_mask, kl_coef if job.kl_is_rewarded else 0.0, job.kl_kind,
        ).sum(dim=1)  # (B,)  # fmt: skip
        targets = Targets(group_advantages(rewards, job.group_size, "rloo"))  # (B,)
        # 4. Clipped updates.
        experience, metrics = optimise(
            stage, step, experience, targets, first_pass, job.epochs, partial(loss, job, kl_coef)
        )
        # 5. Report and save.
        metrics |= resampled | {"kl_coef": kl_coef}
        metrics["flat_groups"] = flat_groups(experience.scores, job.group_size)
        report_and_save(stage, step, experience, metrics)

    return publish(stage)


def loss(
    job: RLOOJob, kl_coef: float, micro_batch: MicroBatch
) -> tuple[Tensor, dict[str, float | Tensor]]:
    """REINFORCE on whole replies (section 3)."""
    total, metrics = rloo_loss(
        micro_batch.logprobs, micro_batch.old_logprobs, micro_batch.weighted_advantages,
        micro_batch.loss_mask, job.clip_range, replies=micro_batch.replies,
        clip_range_high=job.clip_range_high, dual_clip=job.dual_clip,
    )  # fmt: skip
    k3 = kl_estimate(micro_batch.old_logprobs, micro_batch.logprobs.detach(), "k3")  # (b,T)
    approx_kl = masked_sum(k3, micro_batch.loss_mask).double() / micro_batch.tokens
    term, shown = kl_term(job, kl_coef, micro_batch, micro_batch.replies)
    metrics = {"policy_loss": total.detach(), **metrics, "approx_kl": approx_kl, **shown}
    return total + term, metrics
