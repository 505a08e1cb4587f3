"""GRPO (arXiv 2402.03300): replies to one prompt are compared with each other, without a critic.

Advantage of a reply: its score less its group's mean, over the group's standard deviation. The KL
to the reference is a term of the loss (k3), not of the reward, unless `kl_in` says otherwise.
Deviation from the paper: one epoch over a rollout unless `epochs` says otherwise, as in its
experiments; the reference stays the SFT model (the paper's iterative variant is another stage that
starts from this one's result).

Later algorithms are settings of this one:

* Dr. GRPO (arXiv 2503.20783): `scale_rewards=False, average="seq-mean-token-sum-norm"`.
* DAPO (arXiv 2503.14476): `clip_range_high=0.28, average="token-mean", kl_coef=0`.
* GSPO (arXiv 2507.18071): `objective="gspo"`, with a clip_range of a few 1e-4.
* CISPO (arXiv 2506.13585): `objective="cispo", average="token-mean"`.

B replies of a rollout (global), b rows of a micro-batch, T response positions.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from rlhf_core.jobs import GRPOJob
from rlhf_core.losses.advantages import group_advantages, token_rewards
from rlhf_core.losses.group import grpo_loss
from rlhf_core.losses.reductions import Metrics
from rlhf_core.nn.modules import Actor
from rlhf_core.runtime.context import StageContext
from rlhf_core.store import Artifact
from rlhf_core.training.online.dynamic_sampling import sample_groups
from rlhf_core.training.online.experience import Targets, score
from rlhf_core.training.online.heldout import steps_left
from rlhf_core.training.online.kl_control import kl_coefficient
from rlhf_core.training.online.report import flat_groups, report_and_save
from rlhf_core.training.online.stage import fetch_inputs, load_policy, prepare, publish
from rlhf_core.training.online.updates import MicroBatch, optimise
from rlhf_core.training.strategy import Strategy


def run(job: GRPOJob, context: StageContext) -> Artifact | None:
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
        # 3. Advantages: better or worse than the group.
        kl_coef = kl_coefficient(stage)
        kind = "grpo" if job.scale_rewards else "dr_grpo"
        rewards = experience.scores  # (B,)
        if job.kl_is_rewarded:
            rewards = token_rewards(
                rewards, experience.old_logprobs, experience.rewarded_from,
                experience.response_mask, kl_coef, job.kl_kind,
            ).sum(dim=1)  # (B,)  # fmt: skip
        targets = Targets(group_advantages(rewards, job.group_size, kind))  # (B,)
        # 4. Clipped updates.
        experience, metrics = optimise(
            stage, step, experience, targets, first_pass, job.epochs, partial(loss, job, kl_coef)
        )
        # 5. Report and save.
        metrics |= resampled | {"kl_coef": kl_coef}
        metrics["flat_groups"] = flat_groups(experience.scores, job.group_size)
        report_and_save(stage, step, experience, metrics)

    return publish(stage)


def loss(job: GRPOJob, kl_coef: float, micro_batch: MicroBatch) -> tuple[Tensor, Metrics]:
    """The surrogate, with the KL as a term unless the rewards hold it (eq. 3)."""
    total, metrics = grpo_loss(
        micro_batch.logprobs, micro_batch.old_logprobs, micro_batch.ref_logprobs,
        micro_batch.weighted_advantages, micro_batch.loss_mask, job.clip_range,
        kl_coef if job.kl_in == "loss" else 0.0,
        replies=micro_batch.replies, tokens=micro_batch.tokens,
        average=job.average, horizon=job.max_new_tokens, objective=job.objective,
        clip_range_high=job.clip_range_high, dual_clip=job.dual_clip,
        kl_estimator=job.kl_kind, kl_correction=job.kl_correction,
    )  # fmt: skip
    return total, {"policy_loss": total.detach(), **metrics}
