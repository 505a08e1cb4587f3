"""REINFORCE++ (arXiv 2501.03262): PPO's per-token rewards and clip, without its critic.

What a token still earns (the score, less kl_coef times the KL from here on) is its advantage, after
whitening over all tokens of the global batch. One reply to each prompt.

B replies of a rollout (global), b rows of a micro-batch, S positions, T response positions.
"""

from __future__ import annotations

import time
from functools import partial

from torch import Tensor

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.errors import NonFinite
from rlhf_core.jobs import ReinforcePPJob
from rlhf_core.losses.advantages import masked_whiten, returns_to_go, token_rewards
from rlhf_core.losses.ppo import ppo_policy_loss
from rlhf_core.losses.reductions import Metrics
from rlhf_core.models.loading import load_causal_lm
from rlhf_core.nn.modules import Actor
from rlhf_core.runtime.context import StageContext
from rlhf_core.store import Artifact
from rlhf_core.training.batching import batch_rows, learning_rate_scale
from rlhf_core.training.checkpoint import Checkpointer
from rlhf_core.training.nonfinite import failure
from rlhf_core.training.online.batches import split_minibatches
from rlhf_core.training.online.collapse import stop_if_collapsed
from rlhf_core.training.online.engine import start_engine
from rlhf_core.training.online.experience import score
from rlhf_core.training.online.models import load_models, load_ptx, share_trunk
from rlhf_core.training.online.report import inspect, some_samples, summarise
from rlhf_core.training.online.sampling import roll_out
from rlhf_core.training.online.updates import MicroBatch, optimise
from rlhf_core.training.optimizer import adamw
from rlhf_core.training.policy import new_policy, publish_last, save_policy
from rlhf_core.training.strategy import Strategy


def run(job: ReinforcePPJob, context: StageContext) -> Artifact | None:
    """Roll out, score, update; publish the policy. Rank 0 returns the artifact."""
    strategy = Strategy(job.resources, job.precision, job.max_grad_norm)
    source = context.store.fetch(job.model)
    prompts = Rows(context.store.fetch(job.prompts), "train", purpose="prompts")
    ptx = load_ptx(job, context)

    policy = new_policy(job, load_causal_lm(source)).to(strategy.device)
    actor = Actor(policy)
    models = load_models(job, strategy, source, actor, context)
    strategy.prepare(actor, adamw(actor, job, {"": job.learning_rate}))
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
        # 2. Score them: policy, reference, reward model, rules.
        minibatches = split_minibatches(job.replies, job.minibatches)
        late = step > start and job.kl_coef == 0  # the KL is part of the reward
        experience = score(job, strategy, models, rollout, rows, minibatches, late=late)
        # 3. Advantages: whitened over the global batch, which every rank has whole.
        rewards = token_rewards(
            experience.scores, experience.old_logprobs, experience.ref_logprobs,
            experience.mask, job.kl_coef,
        )  # (B,T)  # fmt: skip
        returns = returns_to_go(rewards, experience.mask, job.gamma)  # (B,T)
        experience.advantages = masked_whiten(returns, experience.mask)  # (B,T)
        checkpointer.stop_if_asked(step)
        # 4. Clipped updates.
        try:
            update = optimise(
                job, strategy, experience, minibatches, ptx, step, job.epochs, partial(loss, job)
            )
        except NonFinite as error:
            raise failure(error, checkpointer, step + 1, *inspect(experience)) from error
        # 5. Report, check, save.
        metrics = summarise(job, experience) | update
        metrics["learning_rate"] = job.learning_rate * scale
        metrics["rollout_seconds"] = rollout_seconds
        metrics["tokens_per_second"] = float(experience.mask.sum()) / (time.perf_counter() - began)
        context.log_metrics(step + 1, job.steps, metrics)
        if context.main:
            context.log_samples(step + 1, some_samples(models.tokenizer, experience))
        stop_if_collapsed(
            job, checkpointer, lambda w, folder: save_policy(actor, w, folder, source)
        )
        checkpointer.after_step(step + 1, job.steps)

    return publish_last(job, context, strategy, checkpointer, actor, source)


def loss(job: ReinforcePPJob, part: MicroBatch) -> tuple[Tensor, Metrics]:
    """PPO's clipped surrogate; see `optimise`."""
    now = part.experience
    found, metrics = ppo_policy_loss(
        part.logprobs, part.of(now.old_logprobs), part.of(now.advantages), part.mask,
        job.clip_range, denominator=part.tokens,
    )  # fmt: skip
    kept = {name: metrics[name] for name in ("clip_fraction", "approx_kl")}
    return found, {"policy_loss": found.detach(), **kept}
