"""PPO (arXiv 1707.06347) against rewards, as in InstructGPT, step 3.

Details follow "The N+ implementation details of RLHF with PPO" (arXiv 2403.17031). Deviations:

* Policy and critic share one optimizer step and one gradient clip (they have rates of their own).
* A sampled token depends on (seed, step, row) only, not on the rank, so a run with another number
  of ranks differs by rounding alone.
* A micro-batch is scored (old log-probabilities, values) with the same rows as it is first trained
  with, so that the ratio before the first update is 1 exactly, which is asserted.

B replies of a rollout (global), b rows of a micro-batch, T response positions.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import Tensor

from rlhf_core.jobs import PPOJob
from rlhf_core.losses.advantages import (
    explained_variance,
    gae,
    masked_moments,
    masked_whiten,
    moments_to_stats,
    token_rewards,
)
from rlhf_core.losses.ppo import ppo_policy_loss, ppo_value_loss
from rlhf_core.losses.reductions import Metrics
from rlhf_core.models.loading import load_scalar_model, new_scalar_model
from rlhf_core.nn.layers import choose_trainable
from rlhf_core.nn.modules import ActorCritic, ScalarModel
from rlhf_core.runtime.context import StageContext
from rlhf_core.store import Artifact
from rlhf_core.training.online.experience import Experience, Targets, score
from rlhf_core.training.online.heldout import steps_left
from rlhf_core.training.online.kl_control import kl_coefficient, kl_term
from rlhf_core.training.online.report import report_and_save
from rlhf_core.training.online.sampling import sample
from rlhf_core.training.online.stage import fetch_inputs, load_policy, prepare, publish
from rlhf_core.training.online.updates import MicroBatch, optimise
from rlhf_core.training.policy import enable_checkpointing, frozen_storage
from rlhf_core.training.strategy import Strategy


def run(job: PPOJob, context: StageContext) -> Artifact | None:
    """Sample, score, update; publish the policy. Rank 0 returns the artifact."""
    strategy = Strategy(job.resources, job.precision, job.max_grad_norm)
    inputs = fetch_inputs(job, context)
    policy = load_policy(job, inputs.source, strategy)
    critic = load_critic(job, inputs.source, strategy, context)
    learning_rates = {
        "policy.": job.learning_rate,
        "critic.": job.critic_learning_rate or 5 * job.learning_rate,
    }
    trained = ActorCritic(policy, critic)
    stage = prepare(job, context, strategy, inputs, trained, learning_rates)

    for step in steps_left(stage):
        # 1. Sample a reply to each prompt.
        rollout = sample(stage, step)
        # 2. Score them: policy, critic, reference, reward model, rules.
        experience, first_pass = score(stage, step, rollout)
        # 3. Rewards, and advantages by GAE.
        kl_coef = kl_coefficient(stage)
        targets = estimate_advantages(job, experience, kl_coef)
        # 4. Several epochs of clipped updates.
        experience, metrics = optimise(
            stage,
            step,
            experience,
            targets,
            first_pass,
            job.ppo_epochs,
            partial(loss, job, kl_coef),
        )
        # 5. Report and save.
        metrics["kl_coef"] = kl_coef
        metrics["explained_variance"] = variance_explained(experience, targets)
        report_and_save(stage, step, experience, metrics)

    return publish(stage)


def load_critic(
    job: PPOJob, source: Path, strategy: Strategy, context: StageContext
) -> ScalarModel:
    """The reward model, or without one the SFT model with a fresh head."""
    storage = frozen_storage(job, strategy)
    if job.reward_model is not None:
        critic = load_scalar_model(context.store.fetch(job.reward_model), *storage)
        critic.head.float()  # it is trained
    else:
        critic = new_scalar_model(source, job.seed, *storage)
    critic.backbone = choose_trainable(critic.backbone, job, job.seed + 1)
    if job.resources.gradient_checkpointing:
        enable_checkpointing(critic.backbone)
    strategy.place(critic)
    return critic


def estimate_advantages(job: PPOJob, experience: Experience, kl_coef: float) -> Targets:
    """Advantages (B,T), whitened over the global batch, and returns (B,T), from the scores, the
    KL to the reference and the critic's values."""
    mask, values = experience.response_mask, experience.values  # (B,T) each
    assert values is not None
    rewards = token_rewards(
        experience.scores, experience.old_logprobs, experience.rewarded_from, mask,
        kl_coef if job.kl_is_rewarded else 0.0, job.kl_kind,
    )  # (B,T)  # fmt: skip
    advantages, returns = gae(rewards, values, mask, job.gamma, job.gae_lambda)  # (B,T) each
    # Every rank has the global batch; what is left out of the loss has no part in its moments.
    stats = moments_to_stats(masked_moments(advantages, experience.loss_mask))
    return Targets(masked_whiten(advantages, mask, stats=stats), returns)


def variance_explained(experience: Experience, targets: Targets) -> float:
    """Of the returns by the critic's values, over the tokens that it is trained on."""
    values, returns = experience.values, targets.returns  # (B,T) each
    assert values is not None and returns is not None
    return float(explained_variance(values, returns, experience.loss_mask))


def loss(job: PPOJob, kl_coef: float, micro_batch: MicroBatch) -> tuple[Tensor, Metrics]:
    """The clipped surrogate, or another objective, and the critic's clipped error."""
    mask, tokens = micro_batch.loss_mask, micro_batch.tokens
    policy_loss, policy = ppo_policy_loss(
        micro_batch.logprobs, micro_batch.old_logprobs, micro_batch.weighted_advantages, mask,
        job.clip_range, objective=job.objective, clip_range_high=job.clip_range_high,
        dual_clip=job.dual_clip, denominator=tokens,
    )  # fmt: skip
    assert micro_batch.values is not None
    value_loss, value = ppo_value_loss(
        micro_batch.values, micro_batch.old_values, micro_batch.returns, mask,
        job.value_clip_range, denominator=tokens,
    )  # fmt: skip
    term, of_kl = kl_term(job, kl_coef, micro_batch, tokens)
    metrics = {
        "policy_loss": policy_loss.detach(), "value_loss": value_loss.detach(),
        "value_clip_fraction": value["clip_fraction"], **of_kl,
    }  # fmt: skip
    metrics |= {name: x for name, x in policy.items() if not name.startswith("ratio")}
    return policy_loss + job.value_coef * value_loss + term, metrics
