"""REINFORCE++ (arXiv 2501.03262): PPO's per-token rewards and clip, without its critic.

What a token still earns (the score, less kl_coef times the KL from here on) is its advantage, after
whitening over all tokens of the global batch. One reply to each prompt.

B replies of a rollout (global), b rows of a micro-batch, T response positions.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from rlhf_core.jobs import ReinforcePPJob
from rlhf_core.losses.advantages import masked_whiten, returns_to_go, token_rewards
from rlhf_core.losses.ppo import ppo_policy_loss
from rlhf_core.losses.reductions import Metrics
from rlhf_core.nn.modules import Actor
from rlhf_core.runtime.context import StageContext
from rlhf_core.store import Artifact
from rlhf_core.training.online.experience import Targets, score
from rlhf_core.training.online.heldout import steps_left
from rlhf_core.training.online.kl_control import kl_coefficient, kl_term
from rlhf_core.training.online.report import report_and_save
from rlhf_core.training.online.sampling import sample
from rlhf_core.training.online.stage import fetch_inputs, load_policy, prepare, publish
from rlhf_core.training.online.updates import MicroBatch, optimise
from rlhf_core.training.strategy import Strategy


def run(job: ReinforcePPJob, context: StageContext) -> Artifact | None:
    """Sample, score, update; publish the policy. Rank 0 returns the artifact."""
    strategy = Strategy(job.resources, job.precision, job.max_grad_norm)
    inputs = fetch_inputs(job, context)
    actor = Actor(load_policy(job, inputs.source, strategy))
    stage = prepare(job, context, strategy, inputs, actor, {"": job.learning_rate})

    for step in steps_left(stage):
        # 1. Sample a reply to each prompt.
        rollout = sample(stage, step)
        # 2. Score them: policy, reference, reward model, rules.
        defer = not job.kl_is_rewarded  # otherwise the rewards need the old log-probabilities
        experience, first_pass = score(stage, step, rollout, defer_old_logprobs=defer)
        # 3. Advantages: whitened over the global batch, which every rank has whole.
        kl_coef = kl_coefficient(stage)
        mask = experience.response_mask  # (B,T)
        rewards = token_rewards(
            experience.scores, experience.old_logprobs, experience.rewarded_from, mask,
            kl_coef if job.kl_is_rewarded else 0.0, job.kl_kind,
        )  # (B,T)  # fmt: skip
        returns = returns_to_go(rewards, mask, job.gamma)  # (B,T)
        targets = Targets(masked_whiten(returns, experience.loss_mask))  # (B,T)
        # 4. Clipped updates.
        experience, metrics = optimise(
            stage, step, experience, targets, first_pass, job.epochs, partial(loss, job, kl_coef)
        )
        # 5. Report and save.
        metrics["kl_coef"] = kl_coef
        report_and_save(stage, step, experience, metrics)

    return publish(stage)


def loss(job: ReinforcePPJob, kl_coef: float, micro_batch: MicroBatch) -> tuple[Tensor, Metrics]:
    """PPO's clipped surrogate, or another objective."""
    tokens = micro_batch.tokens
    total, metrics = ppo_policy_loss(
        micro_batch.logprobs, micro_batch.old_logprobs, micro_batch.weighted_advantages,
        micro_batch.loss_mask, job.clip_range, objective=job.objective,
        clip_range_high=job.clip_range_high, dual_clip=job.dual_clip, denominator=tokens,
    )  # fmt: skip
    term, of_kl = kl_term(job, kl_coef, micro_batch, tokens)
    shown = {name: x for name, x in metrics.items() if not name.startswith("ratio")}
    return total + term, {"policy_loss": total.detach(), **shown, **of_kl}
