"""Online DPO (OAIF, arXiv 2402.04792, algorithm 1): the policy's own pairs, judged at once.

Two replies to each prompt, a judge picks the better one, and DPO's loss (arXiv 2305.18290) takes
one step against the SFT model. Notes on the paper:

* The judge is a language model, as in the paper (setting `judge`; asked in both orders, and a pair
  that it decides otherwise in the other order is a tie), or the higher score by the setting
  `rewards`: a reward model, rules, or both.
* One optimizer step per rollout. At that step the loss's gradient with respect to each reply's
  log-probability is known from scoring, so replies are trained one by one (`pairs.reply_weights`);
  the gradient is exactly that of the loss of pairs.
* Log-probabilities are at the sampling temperature, of policy and reference alike.
* The loss of a pair holds whoever sampled it, so that replies of a sampler that computes otherwise,
  or of older weights, are not weighted (`takes_weights`).

B replies of a rollout (global), b rows of a micro-batch, T response positions.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from rlhf_core.jobs.online_dpo import OnlineDPOJob
from rlhf_core.losses.ppo import kl_estimate
from rlhf_core.losses.preference import dpo_loss, ipo_loss
from rlhf_core.losses.reductions import Metrics
from rlhf_core.nn.modules import Actor
from rlhf_core.runtime.context import StageContext
from rlhf_core.store import Artifact
from rlhf_core.training.online.experience import Targets, score
from rlhf_core.training.online.heldout import steps_left
from rlhf_core.training.online.pair_judge import PairJudge
from rlhf_core.training.online.pairs import pick, reply_weights
from rlhf_core.training.online.report import report_and_save
from rlhf_core.training.online.sampling import sample
from rlhf_core.training.online.stage import OnlineStage, fetch_inputs, load_policy, prepare, publish
from rlhf_core.training.online.updates import MicroBatch, optimise
from rlhf_core.training.strategy import Strategy


def run(job: OnlineDPOJob, context: StageContext) -> Artifact | None:
    """Sample, judge, update; publish the policy. Rank 0 returns the artifact."""
    strategy = Strategy(job.resources, job.precision, job.max_grad_norm)
    inputs = fetch_inputs(job, context)
    actor = Actor(load_policy(job, inputs.source, strategy))
    stage = prepare(job, context, strategy, inputs, actor, {"": job.learning_rate})
    judge = start_judge(job, stage)

    for step in steps_left(stage):
        # 1. Two replies to each prompt.
        rollout = sample(stage, step, replies_per_prompt=2)
        # 2. Score them: policy, reference, and reward model and rules or the judge.
        experience, first_pass = score(stage, step, rollout)
        asked: Metrics = {}
        if judge is not None:
            experience, asked = judge.compare(experience)
        # 3. The better one of each pair, and the loss of the pairs.
        mask = experience.loss_mask  # (B,T)
        pairs = pick(experience.scores, job.min_margin, mask.any(dim=1))
        assert experience.ref_logprobs is not None
        logps, ref_logps = (
            (x * mask).sum(dim=1) for x in (experience.old_logprobs, experience.ref_logprobs)
        )  # (B,) each
        weights, found = reply_weights(logps, ref_logps, pairs, partial(loss_of_pairs, job))
        # 4. Update.
        experience, metrics = optimise(
            stage, step, experience, Targets(weights), first_pass, 1, loss
        )
        # 5. Report and save.
        found |= asked | {"ties": pairs.ties}
        if job.mask_truncated_completions:
            found["masked_pairs"] = pairs.masked
        report_and_save(stage, step, experience, metrics | found)

    return publish(stage)


def start_judge(job: OnlineDPOJob, stage: OnlineStage) -> PairJudge | None:
    """Who compares the replies; None where their scores decide. Every rank calls."""
    if job.judge is None:
        return None
    return PairJudge(job.judge, stage.strategy.group, stage.models.tokenizer)


def loss_of_pairs(
    job: OnlineDPOJob, chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor
) -> tuple[Tensor, Metrics]:
    """Mean over the pairs of the rollout: equation 7 of the DPO paper, or IPO."""
    logps = (chosen, rejected, ref_chosen, ref_rejected)  # (n,) each
    if job.loss == "ipo":
        return ipo_loss(*logps, job.beta)
    return dpo_loss(*logps, job.beta, job.label_smoothing)


def loss(micro_batch: MicroBatch) -> tuple[Tensor, Metrics]:
    """The micro-batch's part of a function with the gradient of the loss of pairs: log-probability
    times what it is to rise by."""
    mask = micro_batch.loss_mask  # (b,T)
    logps = (micro_batch.logprobs * mask).sum(dim=1)  # (b,)
    k3 = kl_estimate(micro_batch.old_logprobs, micro_batch.logprobs.detach(), "k3")  # (b,T)
    approx_kl = (k3 * mask).sum() / max(micro_batch.tokens, 1.0)
    return -(micro_batch.advantages * logps).sum(), {"approx_kl": approx_kl}
