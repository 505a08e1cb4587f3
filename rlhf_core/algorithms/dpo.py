"""Direct preference optimisation (DPO, arXiv 2305.18290), with IPO and conservative DPO."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.errors import NonFinite
from rlhf_core.jobs import DPOJob
from rlhf_core.losses.preference import dpo_loss, ipo_loss
from rlhf_core.losses.reductions import Metrics, sequence_logps
from rlhf_core.models.loading import load_causal_lm
from rlhf_core.runtime.context import StageContext
from rlhf_core.store import Artifact
from rlhf_core.training.batching import batch_rows, learning_rate_scale, split_batch, steps_in
from rlhf_core.training.checkpoint import Checkpointer
from rlhf_core.training.nonfinite import failure
from rlhf_core.training.policy import prepare_policy
from rlhf_core.training.preference import (
    PAIR_METRICS,
    by_pair,
    collate_replies,
    heldout_metrics,
    pair_length,
    pair_logps,
    pair_replies,
    pair_tokens,
    publish_results,
    reference_pairs,
)
from rlhf_core.training.strategy import Strategy


def run(job: DPOJob, context: StageContext) -> Artifact | None:
    """Train, evaluate on held-out pairs, publish. Every rank calls; rank 0 returns the artifact."""
    resources = job.resources
    strategy = Strategy(resources, job.precision, job.max_grad_norm)
    source = context.store.fetch(job.model)
    data = context.store.fetch(job.data)
    train = Rows(data, "train", purpose="preference")
    heldout = Rows(data, "heldout", purpose="preference")

    module = prepare_policy(job, load_causal_lm(source), strategy)
    total = steps_in(len(train), job.batch_size, job.epochs, job.max_steps)
    # The reference is this very model, asked once before its weights change.
    reference, heldout_reference = reference_pairs(
        module, train, heldout, job, total, strategy, context
    )
    checkpointer = Checkpointer(context, strategy, job)
    start, _ = checkpointer.restore()

    for step in range(start, total):
        began = time.perf_counter()
        # 1. The global batch of pairs.
        numbers = batch_rows(len(train), job.batch_size, step, job.seed)
        rows = train.take(numbers)
        scale = learning_rate_scale(step, total, job.warmup_fraction, job.schedule)
        scale *= checkpointer.rate
        strategy.set_learning_rate(scale)
        # 2. Chosen and rejected of a pair go through the model in one pass.
        micro = split_batch(
            [pair_length(r) for r in rows],
            strategy.rank, strategy.world_size, resources.micro_batch_size, strategy.padding,
        )  # fmt: skip
        sums = torch.zeros(1 + len(PAIR_METRICS), dtype=torch.float64)
        try:
            for i, positions in enumerate(micro):
                batch = collate_replies(pair_replies([rows[p] for p in positions]), strategy.device)
                ref = reference[[numbers[p] for p in positions]].float().to(strategy.device)
                with strategy.micro_batch(last=i == len(micro) - 1):
                    logprobs = strategy.module(*batch)  # (2b,S)
                    logps = by_pair(sequence_logps(logprobs, batch[2]))  # (b,2)
                    loss, metrics = pair_loss(job, logps, ref, len(rows))
                    strategy.backward(loss)
                sums += torch.tensor([loss.item(), *(float(metrics[k]) for k in PAIR_METRICS)])
            # 3. Update.
            grad_norm = strategy.step()
        except NonFinite as error:
            raise failure(error, checkpointer, step + 1, rows, positions) from error
        # 4. Report and save.
        found = strategy.group.sum(sums).tolist()
        seconds = time.perf_counter() - began
        context.log_metrics(
            step + 1, total,
            {
                **dict(zip(("loss", *PAIR_METRICS), found, strict=True)),
                "learning_rate": job.learning_rate * scale,
                "grad_norm": grad_norm,
                "tokens_per_second": sum(pair_tokens(r) for r in rows) / seconds,
            },
        )  # fmt: skip
        checkpointer.after_step(step + 1, total)

    results: dict[str, float] = {"steps": total}
    if len(heldout):
        logps = pair_logps(
            module, heldout, range(len(heldout)), strategy, resources.micro_batch_size
        )
        results |= heldout_metrics(pair_loss(job, logps, heldout_reference, len(heldout)))
    return publish_results(job, context, strategy, checkpointer, module, source, results)


def pair_loss(job: DPOJob, logps: Tensor, ref: Tensor, pairs: int) -> tuple[Tensor, Metrics]:
    """The loss that the job asks for.

    Args:
        logps, ref: (b,2) log-probabilities of chosen and rejected, of the policy and of the
            untrained model.
        pairs: of the global batch.
    """
    inputs = (*logps.unbind(1), *ref.unbind(1))
    if job.loss == "ipo":
        return ipo_loss(*inputs, job.beta, denominator=float(pairs))
    return dpo_loss(*inputs, job.beta, job.label_smoothing, denominator=float(pairs))
