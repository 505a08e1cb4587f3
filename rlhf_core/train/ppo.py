"""PPO (arXiv 1707.06347) against a reward model, as in InstructGPT, step 3.

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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
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
from rlhf_core.batching import (
    batch_rows,
    derive_seed,
    learning_rate_scale,
    pad_right,
    split_batch,
)
from rlhf_core.checkpoint import Checkpointer
from rlhf_core.context import StageContext
from rlhf_core.data.reading import Rows
from rlhf_core.data.tokenizer import load_tokenizer
from rlhf_core.errors import NonFinite, PolicyCollapse, TrainingFailure
from rlhf_core.jobs import PPOJob
from rlhf_core.losses import kl_estimate, ppo_policy_loss, ppo_value_loss, sft_loss
from rlhf_core.models import (
    ActorCritic,
    Policy,
    ScalarModel,
    adamw,
    choose_trainable,
    export,
    load_causal_lm,
    load_scalar_model,
    save_causal_lm,
    share_frozen,
    stop_tokens,
)
from rlhf_core.nonfinite import failure
from rlhf_core.remote_code import is_trusted
from rlhf_core.rollout import generate, make_row_seeds
from rlhf_core.store import Artifact
from rlhf_core.strategy import HALF, Strategy
from rlhf_core.train.sft import (
    collate,
    enable_checkpointing,
    trained_tokens,
)

SHOWN = 4  # replies of each rollout that are kept for people to look at


@dataclass
class Experience:
    """One rollout of the whole global batch, on every rank, on the CPU."""

    sequences: list[list[int]]  # B x (prompt + response)
    prompt_lengths: list[int]  # B
    finished: Tensor  # (B,) bool
    mask: Tensor  # (B,T) bool, real response tokens
    rollout_logprobs: Tensor  # (B,T)
    old_logprobs: Tensor  # (B,T)
    ref_logprobs: Tensor  # (B,T)
    values: Tensor  # (B,T)
    scores: Tensor  # (B,) of the reward model, less the penalty for a missing end of turn
    raw_scores: Tensor  # (B,) of the reward model
    advantages: Tensor  # (B,T), whitened
    returns: Tensor  # (B,T)


@dataclass
class Models:
    """The four models of PPO; `actor_critic` trains, the other two are frozen."""

    actor_critic: ActorCritic
    reference: Policy
    reward: ScalarModel


def run(job: PPOJob, context: StageContext) -> Artifact | None:
    """Roll out, score, update; publish the policy. Rank 0 returns the artifact."""
    resources = job.resources
    strategy = Strategy(resources, job.precision, job.max_grad_norm)
    source = context.store.fetch(job.model)
    prompts = Rows(context.store.fetch(job.prompts), "train", purpose="prompts")
    ptx = None
    if job.ptx is not None and job.ptx_coef > 0:
        ptx = Rows(context.store.fetch(job.ptx), "train", purpose=("sft", "pretrain"))

    # For people to look at replies.
    tokenizer = load_tokenizer(source, is_trusted(source)) if context.main else None
    models = load_models(job, strategy, source, context.store.fetch(job.reward_model), context)
    rates = {
        "policy.": job.learning_rate,
        "critic.": job.critic_learning_rate or 5 * job.learning_rate,
    }
    strategy.prepare(models.actor_critic, adamw(models.actor_critic, job, rates))
    checkpointer = Checkpointer(context, strategy, job)
    start, _ = checkpointer.restore()

    for step in range(start, job.steps):
        began = time.perf_counter()
        scale = learning_rate_scale(step, job.steps, job.warmup_fraction, job.schedule)
        scale *= checkpointer.rate
        strategy.set_learning_rate(scale)
        # 1. Sample a reply to each prompt.
        rows = prompts.take(batch_rows(len(prompts), job.batch_size, step, job.seed))
        rollout = roll_out(job, strategy, models, source, [r["prompt_ids"] for r in rows], step)
        rollout_seconds = time.perf_counter() - began
        checkpointer.stop_if_asked(step)
        # 2. Score it with all four models; 3. rewards and advantages.
        minibatches = [
            list(range(i, job.batch_size, job.minibatches)) for i in range(job.minibatches)
        ]
        experience = score(job, strategy, models, rollout, minibatches)
        checkpointer.stop_if_asked(step)
        # 4. Several epochs of clipped updates.
        try:
            update = optimise(job, strategy, experience, minibatches, ptx, step)
        except NonFinite as error:
            raise failure(error, checkpointer, step + 1, *inspect(experience)) from error
        # 5. Report, check, save.
        metrics = summarise(experience) | update
        metrics["learning_rate"] = job.learning_rate * scale
        metrics["rollout_seconds"] = rollout_seconds
        metrics["tokens_per_second"] = float(experience.mask.sum()) / (time.perf_counter() - began)
        context.log_metrics(step + 1, job.steps, metrics)
        if tokenizer is not None:
            context.log_samples(step + 1, some_samples(tokenizer, experience))
        check_collapse(job, step, metrics)
        checkpointer.after_step(step + 1, job.steps)

    weights = strategy.weights(keep=context.main)
    if not context.main:
        return None
    folder = context.scratch("result")
    trained = export(models.actor_critic, weights)
    save_causal_lm(trained.policy.model, folder, source)  # type: ignore[union-attr,arg-type]
    last = context.read_metrics()[-1]
    kept = {k: v for k, v in last.items() if k not in ("step", "total", "time")}
    artifact = context.publish(job, folder, {"metrics": {"steps": job.steps, **kept}})
    checkpointer.finish()
    return artifact


def some_samples(tokenizer: Any, experience: Experience) -> list[dict[str, Any]]:
    """The first replies of a rollout as text."""
    found = []
    for row in range(min(SHOWN, len(experience.sequences))):
        ids, start = experience.sequences[row], experience.prompt_lengths[row]
        prompt, reply = (
            tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:start], ids[start:])
        )
        score = round(float(experience.raw_scores[row]), 4)
        found.append({"prompt": prompt, "reply": reply, "score": score})
    return found


def load_models(
    job: PPOJob, strategy: Strategy, source: Path, reward: Path, context: StageContext
) -> Models:
    """Policy and reference from the SFT model, reward model and critic from the reward model."""
    # ZeRO and Gemini hold trained weights in half precision; the frozen models then do as well,
    # so that reference and policy start from the same numbers.
    half = strategy.kind != "ddp" and job.precision != "fp32"
    frozen_dtype = HALF[job.precision] if half else torch.float32
    policy = Policy(choose_trainable(load_causal_lm(source), job, job.seed))
    critic = load_scalar_model(reward)
    critic.backbone = choose_trainable(critic.backbone, job, job.seed + 1)
    if job.resources.gradient_checkpointing:
        enable_checkpointing(policy.model)
        enable_checkpointing(critic.backbone)
    policy.to(strategy.device)
    critic.to(strategy.device)
    # One after another: the peak is then what is kept, not four whole models.
    saved = share_frozen(policy, critic)
    reference = Policy(load_causal_lm(source, frozen_dtype)).requires_grad_(False)
    saved += share_frozen(policy, critic, reference.to(strategy.device))
    reward_model = load_scalar_model(reward, frozen_dtype).requires_grad_(False)
    saved += share_frozen(policy, critic, reference, reward_model.to(strategy.device))
    if saved:
        context.log(f"frozen layers shared between the four models: {saved / 2**20:.0f} MiB saved")
    return Models(ActorCritic(policy, critic), reference, reward_model)


def roll_out(
    job: PPOJob,
    strategy: Strategy,
    models: Models,
    source: Path,
    prompt_ids: list[list[int]],
    step: int,
) -> dict[str, Any]:
    """Sample one reply to every prompt of the global batch, each rank its share.

    Returns:
        On every rank, in the order of the prompts: sequences, prompt_lengths, finished, logprobs.
    """
    group = strategy.group
    order = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))
    mine = order[group.rank :: group.size]
    with strategy.autocast():
        rollout = generate(
            models.actor_critic.policy.model,
            [prompt_ids[i] for i in mine],
            max_new_tokens=job.max_new_tokens,
            temperature=job.temperature,
            eos_ids=stop_tokens(source),
            pad_id=0,
            row_seeds=make_row_seeds(job.seed, step, mine),
        )
    results = []
    for i in range(len(mine)):
        real = rollout.response_mask[i]
        results.append(
            (
                rollout.response_ids[i][real].tolist(),
                rollout.logprobs[i][real].tolist(),
                bool(rollout.finished[i]),
            )
        )
    replies: list[Any] = [None] * len(prompt_ids)
    for position, reply in zip(order, group.interleave(results), strict=True):
        replies[position] = reply
    return {
        "sequences": [[*p, *r[0]] for p, r in zip(prompt_ids, replies, strict=True)],
        "prompt_lengths": [len(p) for p in prompt_ids],
        "logprobs": [r[1] for r in replies],
        "finished": torch.tensor([r[2] for r in replies]),
    }


@torch.no_grad()
def score(
    job: PPOJob,
    strategy: Strategy,
    models: Models,
    rollout: dict[str, Any],
    minibatches: list[list[int]],
) -> Experience:
    """Log-probabilities, values and scores of a rollout; then rewards and advantages."""
    sequences, prompt_lengths = rollout["sequences"], rollout["prompt_lengths"]
    group, found = strategy.group, []
    for positions in micro_batches(job, strategy, sequences, minibatches):
        batch = collate_responses(
            [sequences[p] for p in positions], [prompt_lengths[p] for p in positions], group.device
        )
        marked = batch[2]
        with strategy.autocast():
            old, values, _ = models.actor_critic(*batch, job.temperature)
            ref = models.reference(*batch, job.temperature)
            scores = models.reward(batch[0], batch[1])
        for i, p in enumerate(positions):
            columns = [x[i][marked[i]].float().cpu() for x in (old, ref, values)]
            found.append((p, *columns, float(scores[i])))

    shape = (len(sequences), max(len(x) for x in rollout["logprobs"]))
    mask = torch.zeros(shape, dtype=torch.bool)
    rollout_logprobs, old_logprobs, ref_logprobs, all_values = (torch.zeros(shape) for _ in "1234")
    raw_scores = torch.zeros(shape[0])
    for part in group.gather(found):
        for p, old_row, ref_row, value_row, raw in part:
            n = len(old_row)
            mask[p, :n] = True
            old_logprobs[p, :n], ref_logprobs[p, :n], all_values[p, :n] = (
                old_row, ref_row, value_row,
            )  # fmt: skip
            rollout_logprobs[p, :n] = torch.tensor(rollout["logprobs"][p])
            raw_scores[p] = raw
    finished = rollout["finished"]
    # A reply that was cut is scored as it stands, less the penalty.
    scores = raw_scores - job.missing_eos_penalty * (~finished).float()
    rewards = token_rewards(scores, old_logprobs, ref_logprobs, mask, job.kl_coef)
    advantages, returns = gae(rewards, all_values, mask, job.gamma, job.gae_lambda)
    stats = moments_to_stats(masked_moments(advantages, mask))  # already the global batch
    return Experience(
        sequences=sequences,
        prompt_lengths=prompt_lengths,
        finished=finished,
        mask=mask,
        rollout_logprobs=rollout_logprobs,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        values=all_values,
        scores=scores,
        raw_scores=raw_scores,
        advantages=masked_whiten(advantages, mask, stats=stats),
        returns=returns,
    )


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
    for epoch in range(job.ppo_epochs):
        order = range(len(minibatches))
        if epoch > 0:
            generator = np.random.default_rng(derive_seed(job.seed, step, epoch))
            order = generator.permutation(len(minibatches)).tolist()
        for index in order:
            rows = minibatches[index]
            tokens = float(experience.mask[rows].sum())
            micro = micro_batches(job, strategy, experience.sequences, [rows])
            extra = ptx_batches(job, strategy, ptx, len(rows), step, epoch, index, len(micro))
            sums = torch.zeros(len(UPDATE_METRICS), dtype=torch.float64)
            ratio_max = 0.0
            for i, positions in enumerate(micro):
                batch = collate_responses(
                    [experience.sequences[p] for p in positions],
                    [experience.prompt_lengths[p] for p in positions],
                    strategy.device,
                )
                with strategy.micro_batch(last=i == len(micro) - 1):
                    loss, values, ratio = micro_loss(
                        job, strategy, experience, positions, batch, tokens, extra[i]
                    )
                    strategy.backward(loss)
                sums += values
                ratio_max = max(ratio_max, ratio)
            first = epoch == 0 and index == 0
            if first:
                assert_ratio_is_one(strategy, ratio_max)
            grad_norm = strategy.step()
            totals = strategy.group.sum(sums).tolist()
            update = dict(zip(UPDATE_METRICS, totals, strict=True))
            history.append(update | {"grad_norm": grad_norm})
    mean = {k: float(np.mean([h[k] for h in history])) for k in history[0]}
    mean["approx_kl"] = history[-1]["approx_kl"]  # how far the last update was from the rollout
    if ptx is None:
        del mean["ptx_loss"]
    return mean


UPDATE_METRICS = (
    "policy_loss", "value_loss", "ptx_loss", "clip_fraction", "value_clip_fraction", "approx_kl",
)  # fmt: skip


def micro_loss(
    job: PPOJob,
    strategy: Strategy,
    experience: Experience,
    positions: list[int],
    batch: tuple[Tensor, Tensor, Tensor],
    tokens: float,
    extra: tuple[tuple[Tensor, Tensor, Tensor], float] | None,
) -> tuple[Tensor, Tensor, float]:
    """One micro-batch's share of the loss, of the metrics, and its largest |ratio - 1|."""
    assert strategy.module is not None
    marked = batch[2]
    outputs = strategy.module(*batch, job.temperature, None if extra is None else extra[0])
    mask = experience.mask[positions].to(strategy.device)  # (b,T)

    def aligned(flat: Tensor) -> Tensor:
        """(b,S) at the marked places -> (b,T)."""
        zeros = torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device)
        return zeros.masked_scatter(mask, flat[marked])

    def of(whole: Tensor) -> Tensor:
        return whole[positions].to(strategy.device)

    logprobs, values = aligned(outputs[0].float()), aligned(outputs[1].float())
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
    gap = (logprobs.detach() - of(experience.old_logprobs)).abs()
    return loss, torch.tensor(shares, dtype=torch.float64), float((gap * mask).max())


def assert_ratio_is_one(strategy: Strategy, gap: float) -> None:
    """Before the first update of a rollout, training must see the log-probabilities it scored.

    Raises:
        TrainingFailure: a log-ratio is off by more than rounding.
    """
    bound = 1e-3 if strategy.precision == "fp32" else 0.05
    if gap > bound:
        raise TrainingFailure(
            f"Before the first update the log-probability of a token differs by {gap:.4f} between "
            f"scoring and training (bound {bound}): the model is not deterministic. Switch off "
            "dropout and custom kernels, or use precision fp32."
        )


def micro_batches(
    job: PPOJob, strategy: Strategy, sequences: Sequence[list[int]], minibatches: list[list[int]]
) -> list[list[int]]:
    """This rank's micro-batches, as row numbers of the rollout, minibatch after minibatch."""
    result = []
    for rows in minibatches:
        for positions in split_batch(
            [len(sequences[r]) for r in rows],
            strategy.rank, strategy.world_size, job.resources.micro_batch_size,
        ):  # fmt: skip
            result.append([rows[p] for p in positions])
    return result


def ptx_batches(
    job: PPOJob,
    strategy: Strategy,
    ptx: Rows | None,
    count: int,
    step: int,
    epoch: int,
    index: int,
    micro: int,
) -> list[tuple[tuple[Tensor, Tensor, Tensor], float] | None]:
    """As many language-modelling rows as the minibatch has replies, cut alike, with their count."""
    if ptx is None:
        return [None] * micro
    number = (step * job.ppo_epochs + epoch) * job.minibatches + index
    rows = ptx.take(batch_rows(len(ptx), count, number, derive_seed(job.seed, 0x907)))
    tokens = float(sum(trained_tokens(r) for r in rows))
    parts = split_batch(
        [len(r["input_ids"]) for r in rows],
        strategy.rank, strategy.world_size, job.resources.micro_batch_size,
    )  # fmt: skip
    assert len(parts) == micro, f"{len(parts)} ptx micro-batches for {micro}"
    return [(collate([rows[p] for p in part], strategy.device), tokens) for part in parts]


def collate_responses(
    sequences: Sequence[list[int]], prompt_lengths: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids (b,S), mask (b,S) bool, marked (b,S) bool: True at response tokens."""
    input_ids, mask = pad_right(sequences)
    marked = mask.clone()
    for i, length in enumerate(prompt_lengths):
        marked[i, :length] = False
    return input_ids.to(device), mask.to(device), marked.to(device)


def inspect(experience: Experience) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """A rollout for a person: rows of token ids, and tensors with one row for each."""
    rows = [
        {"input_ids": sequence, "prompt_length": length}
        for sequence, length in zip(experience.sequences, experience.prompt_lengths, strict=True)
    ]
    whole = vars(experience).items()
    return rows, {name: value for name, value in whole if isinstance(value, Tensor)}


def summarise(experience: Experience) -> dict[str, float]:
    """Metrics of a rollout. KL in nats per reply, length in tokens."""
    mask = experience.mask
    k1 = kl_estimate(experience.old_logprobs, experience.ref_logprobs, "k1")
    k3 = kl_estimate(experience.old_logprobs, experience.ref_logprobs, "k3")
    tokens = mask.sum()
    gap = (experience.rollout_logprobs - experience.old_logprobs).abs()
    return {
        "score": float(experience.raw_scores.mean()),
        "reward": float(experience.scores.mean()),
        "kl": float((k1 * mask).sum() / len(mask)),
        "kl_k3": float((k3 * mask).sum() / len(mask)),
        "length": float(tokens / len(mask)),
        "finished": float(experience.finished.float().mean()),
        "entropy": float(-(experience.old_logprobs * mask).sum() / tokens),
        "explained_variance": float(
            explained_variance(experience.values, experience.returns, mask)
        ),
        "rollout_logprob_gap": float((gap * mask).sum() / tokens),
    }


def check_collapse(job: PPOJob, step: int, metrics: dict[str, float]) -> None:
    """Stop a policy that has run away from the SFT model.

    Raises:
        PolicyCollapse: the mean KL of a reply exceeds max_kl.
    """
    if metrics["kl"] > job.max_kl:
        raise PolicyCollapse(
            f"PPO step {step + 1}: the KL to the SFT model is {metrics['kl']:.1f} nats a reply, "
            f"above ppo.max_kl {job.max_kl:g}: the policy has left the region where the reward "
            "model can judge. Raise ppo.kl_coef or lower ppo.learning_rate, and run again: PPO "
            "then starts anew, the stages before it are reused."
        )
