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
from pathlib import Path

import torch
from torch import Tensor

from rlhf_core.advantages import (
    explained_variance,
    gae,
    masked_moments,
    masked_whiten,
    moments_to_stats,
    token_rewards,
)
from rlhf_core.batching import batch_rows, learning_rate_scale
from rlhf_core.checkpoint import Checkpointer
from rlhf_core.context import StageContext
from rlhf_core.data.reading import Rows
from rlhf_core.errors import NonFinite
from rlhf_core.jobs import PPOJob
from rlhf_core.losses import ppo_policy_loss, ppo_value_loss, sft_loss
from rlhf_core.models import (
    ActorCritic,
    ScalarModel,
    adamw,
    choose_trainable,
    load_scalar_model,
    new_scalar_model,
)
from rlhf_core.nonfinite import failure
from rlhf_core.store import Artifact
from rlhf_core.strategy import Strategy
from rlhf_core.train.collapse import stop_if_collapsed
from rlhf_core.train.experience import (
    Experience,
    inspect,
    roll_out,
    score,
    some_samples,
    summarise,
)
from rlhf_core.train.online import (
    Batch,
    aligned,
    assert_ratio_is_one,
    collate_responses,
    load_models,
    load_policy,
    load_ptx,
    log_ratio_gap,
    mean_over_updates,
    micro_batches,
    passes,
    ptx_batches,
    publish_policy,
    save_policy,
    split_minibatches,
)
from rlhf_core.train.sft import enable_checkpointing


def run(job: PPOJob, context: StageContext) -> Artifact | None:
    """Roll out, score, update; publish the policy. Rank 0 returns the artifact."""
    strategy = Strategy(job.resources, job.precision, job.max_grad_norm)
    source = context.store.fetch(job.model)
    prompts = Rows(context.store.fetch(job.prompts), "train", purpose="prompts")
    ptx = load_ptx(job, context)

    policy = load_policy(job, source, strategy.device)
    actor_critic = ActorCritic(policy, load_critic(job, source, strategy.device, context))
    models = load_models(job, strategy, source, actor_critic, context)
    rates = {
        "policy.": job.learning_rate,
        "critic.": job.critic_learning_rate or 5 * job.learning_rate,
    }
    strategy.prepare(actor_critic, adamw(actor_critic, job, rates))
    checkpointer = Checkpointer(context, strategy, job)
    start, _ = checkpointer.restore()

    for step in range(start, job.steps):
        began = time.perf_counter()
        scale = learning_rate_scale(step, job.steps, job.warmup_fraction, job.schedule)
        scale *= checkpointer.rate
        strategy.set_learning_rate(scale)
        # 1. Sample a reply to each prompt.
        rows = prompts.take(batch_rows(len(prompts), job.batch_size, step, job.seed))
        prompt_ids = [r["prompt_ids"] for r in rows]
        rollout = roll_out(job, strategy, policy.model, source, prompt_ids, step)
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
            update = optimise(job, strategy, experience, minibatches, ptx, step)
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

    return publish_policy(job, context, strategy, checkpointer, actor_critic, source)


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


def optimise(
    job: PPOJob,
    strategy: Strategy,
    experience: Experience,
    minibatches: list[list[int]],
    ptx: Rows | None,
    step: int,
) -> dict[str, float]:
    """ppo_epochs passes over the rollout, one optimizer step per minibatch.

    Returns:
        Means over all updates of losses, clip fractions and the gradient norm.
    """
    history: list[dict[str, float]] = []
    for epoch, index, number in passes(job.seed, step, job.ppo_epochs, job.minibatches):
        rows = minibatches[index]
        tokens = float(experience.mask[rows].sum())
        micro = micro_batches(job, strategy, experience.sequences, [rows])
        extra = ptx_batches(job, strategy, ptx, len(rows), number, len(micro))
        sums = torch.zeros(len(UPDATE_METRICS), dtype=torch.float64)
        gap = 0.0
        for i, positions in enumerate(micro):
            batch = collate_responses(
                experience.sequences, experience.prompt_lengths, positions, strategy.device
            )
            with strategy.micro_batch(last=i == len(micro) - 1):
                loss, shares, log_ratio = micro_loss(
                    job, strategy, experience, positions, batch, tokens, extra[i]
                )
                strategy.backward(loss)
            sums += shares
            gap = max(gap, log_ratio)
        if epoch == 0 and index == 0:
            assert_ratio_is_one(strategy, gap)
        grad_norm = strategy.step()
        totals = strategy.group.sum(sums).tolist()
        history.append(dict(zip(UPDATE_METRICS, totals, strict=True)) | {"grad_norm": grad_norm})
    return mean_over_updates(history, ptx is not None)


UPDATE_METRICS = (
    "policy_loss", "value_loss", "ptx_loss", "clip_fraction", "value_clip_fraction", "approx_kl",
)  # fmt: skip


def micro_loss(
    job: PPOJob,
    strategy: Strategy,
    experience: Experience,
    positions: list[int],
    batch: Batch,
    tokens: float,
    extra: tuple[Batch, float] | None,
) -> tuple[Tensor, Tensor, float]:
    """One micro-batch's share of the loss, of the metrics, and its largest |log-ratio|."""
    assert strategy.module is not None

    def of(whole: Tensor | None) -> Tensor:
        assert whole is not None
        return whole[positions].to(strategy.device)

    outputs = strategy.module(*batch, job.temperature, None if extra is None else extra[0])
    mask = of(experience.mask)  # (b,T)
    logprobs = aligned(outputs[0], batch[2], mask)  # (b,T)
    values = aligned(outputs[1], batch[2], mask)  # (b,T)
    policy_loss, policy = ppo_policy_loss(
        logprobs, of(experience.old_logprobs), of(experience.advantages), mask,
        job.clip_range, denominator=tokens,
    )  # fmt: skip
    value_loss, value = ppo_value_loss(
        values, of(experience.values), of(experience.returns), mask,
        job.value_clip_range, denominator=tokens,
    )  # fmt: skip
    loss = policy_loss + job.value_coef * value_loss
    ptx_loss = 0.0
    if extra is not None:
        ptx_term, _ = sft_loss(outputs[2], extra[0][2], denominator=extra[1])
        loss = loss + job.ptx_coef * ptx_term
        ptx_loss = ptx_term.item()
    shares = [
        policy_loss.item(), value_loss.item(), ptx_loss, float(policy["clip_fraction"]),
        float(value["clip_fraction"]), float(policy["approx_kl"]),
    ]  # fmt: skip
    gap = log_ratio_gap(logprobs, of(experience.old_logprobs), mask)
    return loss, torch.tensor(shares, dtype=torch.float64), gap
