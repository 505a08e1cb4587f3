"""Direct preference optimisation (DPO, arXiv 2305.18290), with IPO and conservative DPO.

b pairs of a micro-batch; a tensor (b,2) has columns for chosen and rejected responses.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from rlhf_core.jobs import DPOJob
from rlhf_core.losses.preference import dpo_loss, ipo_loss
from rlhf_core.losses.reductions import Metrics
from rlhf_core.nn.padding import to_device
from rlhf_core.runtime.context import StageContext
from rlhf_core.store import Artifact
from rlhf_core.training.checkpoint import Checkpointer
from rlhf_core.training.pairs import (
    ScoredPairs,
    evaluate_pairs,
    prepare_pairs,
    reference_logps,
    report_and_save,
    take_pairs,
    update_on_pairs,
)
from rlhf_core.training.policy import publish_policy
from rlhf_core.training.selection import LOWEST_LOSS, Selection


def run(job: DPOJob, context: StageContext) -> Artifact | None:
    """Train, evaluate on held-out pairs, publish. Every rank calls; rank 0 returns the artifact."""
    stage = prepare_pairs(job, context)
    # The reference is this very model before its weights change.
    reference, heldout_reference = reference_logps(stage)
    checkpointer = Checkpointer(context, stage.strategy, job)
    start, _ = checkpointer.restore()
    evaluate = partial(evaluate_pairs, stage, partial(loss, job, heldout_reference))
    selection = Selection(job, checkpointer, LOWEST_LOSS, len(stage.heldout))

    for step in selection.steps(start, stage.total):
        # 1. The global batch of pairs.
        batch = take_pairs(stage, step)
        # 2. Update.
        metrics = update_on_pairs(stage, checkpointer, step, batch, partial(loss, job, reference))
        # 3. Report, evaluate and save.
        report_and_save(stage, selection, step, batch, metrics, evaluate)

    result = {"metrics": selection.heldout(stage.total, evaluate)}
    return publish_policy(
        job, context, stage.strategy, checkpointer, stage.module, stage.source, result
    )


def loss(job: DPOJob, reference: Tensor, pairs: ScoredPairs) -> tuple[Tensor, Metrics]:
    """Equation 7, or the variant that the job asks for.

    Args:
        reference: (n,2) log-probabilities (nats) of the data set's pairs, of the untrained policy.
    """
    ref_logps = reference[pairs.numbers].to(pairs.logps.dtype)  # (b,2)
    ref_logps = to_device(ref_logps, pairs.logps.device)
    logps = (*pairs.logps.unbind(1), *ref_logps.unbind(1))  # (b,) each
    if job.loss == "ipo":
        return ipo_loss(*logps, job.beta, denominator=float(pairs.pairs))
    return dpo_loss(*logps, job.beta, job.label_smoothing, denominator=float(pairs.pairs))
