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
    prepare_pairs,
    report_and_save,
    score_heldout,
    take_pairs,
    update_on_pairs,
)
from rlhf_core.training.preference import heldout_metrics, publish_results


def run(job: ORPOJob, context: StageContext) -> Artifact | None:
    """Train, evaluate on held-out pairs, publish. Every rank calls; rank 0 returns the artifact."""
    stage = prepare_pairs(job, context)
    checkpointer = Checkpointer(context, stage.strategy, job)
    start, _ = checkpointer.restore()

    for step in range(start, stage.total):
        # 1. The global batch of pairs.
        batch = take_pairs(stage, step)
        # 2. Update.
        metrics = update_on_pairs(stage, checkpointer, step, batch, partial(loss, job))
        # 3. Report and save.
        report_and_save(stage, checkpointer, step, batch, metrics)

    results: dict[str, float] = {"steps": stage.total}
    if len(stage.heldout):
        total, found = loss(job, score_heldout(stage))
        results |= heldout_metrics(total, found) | {"heldout_nll": float(found["nll"])}
    return publish_results(
        job, context, stage.strategy, checkpointer, stage.module, stage.source, results
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
