"""PPO (arXiv 1707.06347) against rewards, as in InstructGPT, step 3.

Details follow "The N+ implementation details of RLHF with PPO" (arXiv 2403.17031). Deviations:

* Policy and critic share one optimizer step and one gradient clip (they have rates of their own).
* A sampled token depends on (seed, step, row) only, not on the rank, so a run with another number
  of ranks differs by rounding alone.
* A micro-batch is scored (old log-probabilities, values) with the same rows as it is first trained
  with, so that the ratio before the first update is 1 exactly, which is asserted.

B prompts of a rollout (global), b rows of a micro-batch, S positions, T response positions.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.errors import NonFinite
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
from rlhf_core.models.loading import load_causal_lm, load_scalar_model, new_scalar_model
from rlhf_core.nn.layers import choose_trainable
from rlhf_core.nn.modules import ActorCritic, ScalarModel
from rlhf_core.runtime.context import StageContext
from rlhf_core.store import Artifact
from rlhf_core.training.batching import batch_rows, learning_rate_scale
from rlhf_core.training.checkpoint import Checkpointer
from rlhf_core.training.nonfinite import failure
from rlhf_core.training.online.batches import split_minibatches
from rlhf_core.training.online.collapse import stop_if_collapsed
from rlhf_core.training.online.engine import start_engine
from rlhf_core.training.online.experience import Experience, score
from rlhf_core.training.online.models import load_models, load_ptx, share_trunk
from rlhf_core.training.online.report import inspect, some_samples, summarise
from rlhf_core.training.online.sampling import roll_out
from rlhf_core.training.online.updates import MicroBatch, optimise
from rlhf_core.training.optimizer import adamw
from rlhf_core.training.policy import enable_checkpointing, new_policy, publish_last, save_policy
from rlhf_core.training.strategy import Strategy


def run(job: PPOJob, context: StageContext) -> Artifact | None:
    """Roll out, score, update; publish the policy. Rank 0 returns the artifact."""
    strategy = Strategy(job.resources, job.precision, job.max_grad_norm)
    source = context.store.fetch(job.model)
    prompts = Rows(context.store.fetch(job.prompts), "train", purpose="prompts")
    ptx = load_ptx(job, context)

    policy = new_policy(job, load_causal_lm(source)).to(strategy.device)
    actor_critic = ActorCritic(policy, load_critic(job, source, strategy.device, context))
    models = load_models(job, strategy, source, actor_critic, context)
    rates = {
        "policy.": job.learning_rate,
        "critic.": job.critic_learning_rate or 5 * job.learning_rate,
    }
    strategy.prepare(actor_critic, adamw(actor_critic, job, rates))
    share_trunk(job, strategy, models, context)
    checkpointer = Checkpointer(context, strategy, job)
    start, _ = checkpointer.restore()
    engine = start_engine(job, strategy, source, prompts, context)

    for step in range(start, job.steps):
        began = time.perf_counter()
        scale = learning_rate_scale(step, job.steps, job.warmup_fraction, job.schedule)
        scale *= checkpointer.rate
        strategy.set_learning_rate(scale)
        # 1. Sample a reply to each prompt.
        rows = prompts.take(batch_rows(len(prompts), job.batch_size, step, job.seed))
        prompt_ids = [r["prompt_ids"] for r in rows]
        rollout = roll_out(job, strategy, policy.model, source, prompt_ids, step, engine)
        rollout_seconds = time.perf_counter() - began
        checkpointer.stop_if_asked(step)
        # 2. Score it with all four models and the rules.
        minibatches = split_minibatches(job.batch_size, job.minibatches)
        experience = score(job, strategy, models, rollout, rows, minibatches)
        # 3. Rewards and advantages.
        add_advantages(job, experience)
        checkpointer.stop_if_asked(step)
        # 4. Several epochs of clipped updates.
        try:
            update = optimise(
                job,
                strategy,
                experience,
                minibatches,
                ptx,
                step,
                job.ppo_epochs,
                partial(loss, job),
            )  # fmt: skip
        except NonFinite as error:
            raise failure(error, checkpointer, step + 1, *inspect(experience)) from error
        # 5. Report, check, save.
        metrics = summarise(job, experience) | update
        metrics["explained_variance"] = float(
            explained_variance(experience.values, experience.returns, experience.mask)
        )
        metrics["learning_rate"] = job.learning_rate * scale
        metrics["rollout_seconds"] = rollout_seconds
        metrics["tokens_per_second"] = float(experience.mask.sum()) / (time.perf_counter() - began)
        context.log_metrics(step + 1, job.steps, metrics)
        if context.main:
            context.log_samples(step + 1, some_samples(models.tokenizer, experience))
        stop_if_collapsed(
            job, checkpointer, lambda w, folder: save_policy(actor_critic, w, folder, source)
        )
        checkpointer.after_step(step + 1, job.steps)

    return publish_last(job, context, strategy, checkpointer, actor_critic, source)


def load_critic(
    job: PPOJob, source: Path, device: torch.device, context: StageContext
) -> ScalarModel:
    """The reward model, or without one the SFT model with a fresh head."""
    if job.reward_model is not None:
        critic = load_scalar_model(context.store.fetch(job.reward_model))
    else:
        critic = new_scalar_model(source, job.seed)
    critic.backbone = choose_trainable(critic.backbone, job, job.seed + 1)
    if job.resources.gradient_checkpointing:
        enable_checkpointing(critic.backbone)
    return critic.to(device)


def add_advantages(job: PPOJob, experience: Experience) -> None:
    """Whitened advantages (B,T) and returns (B,T) from scores, KL and values."""
    mask, values = experience.mask, experience.values
    assert values is not None
    rewards = token_rewards(
        experience.scores, experience.old_logprobs, experience.ref_logprobs, mask, job.kl_coef
    )
    advantages, experience.returns = gae(rewards, values, mask, job.gamma, job.gae_lambda)
    stats = moments_to_stats(masked_moments(advantages, mask))  # already the global batch
    experience.advantages = masked_whiten(advantages, mask, stats=stats)


def loss(job: PPOJob, part: MicroBatch) -> tuple[Tensor, Metrics]:
    """The clipped surrogate and the critic's clipped error; see `optimise`."""
    now = part.experience
    policy_loss, policy = ppo_policy_loss(
        part.logprobs, part.of(now.old_logprobs), part.of(now.advantages), part.mask,
        job.clip_range, denominator=part.tokens,
    )  # fmt: skip
    assert part.values is not None
    value_loss, value = ppo_value_loss(
        part.values, part.of(now.values), part.of(now.returns), part.mask,
        job.value_clip_range, denominator=part.tokens,
    )  # fmt: skip
    metrics = {
        "policy_loss": policy_loss.detach(), "value_loss": value_loss.detach(),
        "clip_fraction": policy["clip_fraction"], "value_clip_fraction": value["clip_fraction"],
        "approx_kl": policy["approx_kl"],
    }  # fmt: skip
    return policy_loss + job.value_coef * value_loss, metrics
