"""Odds ratio preference optimisation (ORPO, arXiv 2403.07691): fine-tuning on the chosen replies
and a term that makes them more likely than the rejected ones, in one stage without a reference.

The paper's loss (equation 6) is L_SFT + lambda L_OR. L_SFT is here the mean over all chosen tokens
of the global batch, as in the SFT stage, so that a token weighs the same in a long reply.

b pairs of a micro-batch; a tensor (b,2) has columns for chosen and rejected responses.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from rlhf_core.jobs import ORPOJob
from rlhf_core.losses.preference import orpo_odds_loss
from rlhf_core.losses.reductions import Metrics
from rlhf_core.runtime.context import StageContext
from rlhf_core.store import Artifact
from rlhf_core.training.checkpoint import Checkpointer
from rlhf_core.training.pairs import (
    ScoredPairs,
    evaluate_pairs,
    prepare_pairs,
    report_and_save,
    take_pairs,
    update_on_pairs,
)
from rlhf_core.training.policy import publish_policy
from rlhf_core.training.selection import LOWEST_LOSS, Selection


def run(job: ORPOJob, context: StageContext) -> Artifact | None:
    """Train, evaluate on held-out pairs, publish. Every rank calls; rank 0 returns the artifact."""
    stage = prepare_pairs(job, context)
    checkpointer = Checkpointer(context, stage.strategy, job)
    start, _ = checkpointer.restore()
    evaluate = partial(evaluate_pairs, stage, partial(loss, job))
    selection = Selection(job, checkpointer, LOWEST_LOSS, len(stage.heldout))

    for step in selection.steps(start, stage.total):
        # 1. The global batch of pairs.
        batch = take_pairs(stage, step)
        # 2. Update.
        metrics = update_on_pairs(stage, checkpointer, step, batch, partial(loss, job))
        # 3. Report, evaluate and save.
        report_and_save(stage, selection, step, batch, metrics, evaluate)

    result = {"metrics": selection.heldout(stage.total, evaluate)}
    return publish_policy(
        job, context, stage.strategy, checkpointer, stage.module, stage.source, result
    )


def loss(job: ORPOJob, pairs: ScoredPairs) -> tuple[Tensor, Metrics]:
    """Equation 6: cross-entropy of the chosen replies plus orpo_lambda times the odds-ratio term.

    Returns:
        The loss, and ``nll`` (nats per token), ``odds_loss`` and the metrics of the odds.
    """
    nll = -pairs.logps[:, 0].sum() / pairs.chosen_tokens
    means = pairs.logps / pairs.lengths  # (b,2)
    odds_loss, metrics = orpo_odds_loss(*means.unbind(1), denominator=float(pairs.pairs))
    metrics |= {"nll": nll.detach(), "odds_loss": odds_loss.detach()}
    return nll + job.orpo_lambda * odds_loss, metrics
