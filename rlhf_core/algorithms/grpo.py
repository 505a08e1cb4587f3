"""GRPO (arXiv 2402.03300): replies to one prompt are compared with each other, without a critic.

Advantage of a reply: its score less its group's mean, over the group's deviation. The KL to the
reference is a term of the loss (k3), not of the reward. Deviations from the paper:

* One pass over a rollout unless `epochs` says otherwise, as in its experiments; the reference stays
  the SFT model (the paper's iterative variant is another stage that starts from this one's result).
* `scale_rewards=False, average="token"` is Dr. GRPO (arXiv 2503.20783).

B replies of a rollout (global), b rows of a micro-batch, S positions, T response positions.
"""

from __future__ import annotations

import time
from functools import partial

from torch import Tensor

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.errors import NonFinite
from rlhf_core.jobs import GRPOJob
from rlhf_core.losses.advantages import group_advantages
from rlhf_core.losses.group import grpo_loss
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


def run(job: GRPOJob, context: StageContext) -> Artifact | None:
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
        # 1. Sample group_size replies to each prompt; a group's replies are neighbours.
        rows = prompts.take(batch_rows(len(prompts), job.batch_size, step, job.seed))
        rows = [row for row in rows for _ in range(job.group_size)]
        prompt_ids = [r["prompt_ids"] for r in rows]
        rollout = roll_out(job, strategy, policy.model, source, prompt_ids, step, engine)
        rollout_seconds = time.perf_counter() - began
        checkpointer.stop_if_asked(step)
        # 2. Score them: policy, reference, reward model, rules.
        minibatches = split_minibatches(job.replies, job.minibatches)
        late = step > start
        experience = score(job, strategy, models, rollout, rows, minibatches, late=late)
        # 3. Advantages: better or worse than the group.
        kind = "grpo" if job.scale_rewards else "dr_grpo"
        experience.advantages = group_advantages(experience.scores, job.group_size, kind)  # (B,)
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
        # A group of equal scores teaches nothing.
        groups = experience.scores.view(-1, job.group_size)
        metrics["flat_groups"] = float((groups.amax(1) == groups.amin(1)).float().mean())
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


def loss(job: GRPOJob, part: MicroBatch) -> tuple[Tensor, Metrics]:
    """The clipped surrogate with the KL as a term; see `optimise`."""
    now = part.experience
    found, metrics = grpo_loss(
        part.logprobs, part.of(now.old_logprobs), part.of(now.ref_logprobs),
        part.of(now.advantages), part.mask, job.clip_range, job.kl_coef,
        replies=part.replies, tokens=part.tokens, average=job.average,
    )  # fmt: skip
    return found, {"policy_loss": found.detach(), **metrics}
