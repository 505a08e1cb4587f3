"""Simple preference optimisation (SimPO, arXiv 2405.14734): mean log-probs, no reference model."""

from __future__ import annotations

import time

import torch

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.errors import NonFinite
from rlhf_core.jobs import SimPOJob
from rlhf_core.losses.preference import simpo_loss
from rlhf_core.losses.reductions import sequence_logps
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
    pair_response_lengths,
    pair_tokens,
    publish_results,
)
from rlhf_core.training.strategy import Strategy


def run(job: SimPOJob, context: StageContext) -> Artifact | None:
    """Train, evaluate on held-out pairs, publish. Every rank calls; rank 0 returns the artifact."""
    resources = job.resources
    strategy = Strategy(resources, job.precision, job.max_grad_norm)
    source = context.store.fetch(job.model)
    data = context.store.fetch(job.data)
    train = Rows(data, "train", purpose="preference")
    heldout = Rows(data, "heldout", purpose="preference")

    module = prepare_policy(job, load_causal_lm(source), strategy)
    checkpointer = Checkpointer(context, strategy, job)
    total = steps_in(len(train), job.batch_size, job.epochs, job.max_steps)
    start, _ = checkpointer.restore()

    for step in range(start, total):
        began = time.perf_counter()
        # 1. The global batch of pairs.
        rows = train.take(batch_rows(len(train), job.batch_size, step, job.seed))
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
                with strategy.micro_batch(last=i == len(micro) - 1):
                    logprobs = strategy.module(*batch)  # (2b,S)
                    means = by_pair(sequence_logps(logprobs, batch[2], mean=True))  # (b,2)
                    loss, metrics = simpo_loss(
                        *means.unbind(1), job.beta, job.gamma, denominator=float(len(rows))
                    )
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
        micro_size, everything = resources.micro_batch_size, range(len(heldout))
        logps = pair_logps(module, heldout, everything, strategy, micro_size)  # (n,2)
        means = logps / pair_response_lengths(heldout)  # (n,2)
        results |= heldout_metrics(simpo_loss(*means.unbind(1), job.beta, job.gamma))
    return publish_results(job, context, strategy, checkpointer, module, source, results)
