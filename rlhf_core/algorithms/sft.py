"""Supervised fine-tuning: cross-entropy on the assistant's tokens (InstructGPT, step 1).

Also the second half of rejection sampling, on the replies that `stages/best_of_n.py` kept.

b rows of a micro-batch, S positions.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.jobs import SFTJob
from rlhf_core.jobs.best_of_n import RejectionSamplingJob
from rlhf_core.losses.supervised import sft_loss
from rlhf_core.models.loading import load_causal_lm
from rlhf_core.runtime.context import StageContext
from rlhf_core.store import Artifact
from rlhf_core.training.batching import batch_rows, split_batch, steps_in
from rlhf_core.training.checkpoint import Checkpointer
from rlhf_core.training.language_modelling import collate, heldout_loss, trained_tokens
from rlhf_core.training.policy import frozen_storage, prepare_policy, publish_policy
from rlhf_core.training.schedule import set_learning_rate
from rlhf_core.training.selection import LOWEST_LOSS, Selection
from rlhf_core.training.strategy import Strategy
from rlhf_core.training.updates import update_on_batch


def run(job: SFTJob | RejectionSamplingJob, context: StageContext) -> Artifact | None:
    """Train, evaluate on held-out rows, publish. Every rank calls; rank 0 returns the artifact."""
    micro_batch_size = job.resources.micro_batch_size
    strategy = Strategy(job.resources, job.precision, job.max_grad_norm)
    source = context.store.fetch(job.model)
    data = context.store.fetch(job.data)
    train = Rows(data, "train", purpose="sft")
    heldout = Rows(data, "heldout", purpose="sft")

    module = prepare_policy(job, load_causal_lm(source, *frozen_storage(job, strategy)), strategy)
    checkpointer = Checkpointer(context, strategy, job)
    total = steps_in(train, job.batch_size, job.epochs, job.max_steps)
    start, _ = checkpointer.restore()
    evaluate = partial(heldout_loss, module, heldout, strategy.group, micro_batch_size, strategy)
    selection = Selection(job, checkpointer, LOWEST_LOSS, len(heldout))

    for step in selection.steps(start, total):
        began = time.perf_counter()
        # 1. The global batch; every rank knows all of it, so the denominator needs no exchange.
        rows = train.take(batch_rows(train, job.batch_size, step, job.seed))
        trained = sum(trained_tokens(row) for row in rows)
        learning_rate = set_learning_rate(job, strategy, checkpointer, step, total)
        # 2. Update.
        micro_batches = split_batch(
            [len(row["input_ids"]) for row in rows],
            strategy.group, micro_batch_size, strategy.padding,
        )  # fmt: skip
        metrics = update_on_batch(
            strategy, checkpointer, step, rows, micro_batches,
            partial(loss, strategy, rows, trained),
        )  # fmt: skip
        # 3. Report, evaluate and save.
        tokens = sum(len(row["input_ids"]) for row in rows)
        metrics |= {
            "learning_rate": learning_rate,
            "tokens_per_second": tokens / (time.perf_counter() - began),
        }
        selection.after_step(step + 1, total, metrics, evaluate)

    result = {"metrics": selection.heldout(total, evaluate)}
    return publish_policy(job, context, strategy, checkpointer, module, source, result)


def loss(
    strategy: Strategy, rows: Sequence[Mapping[str, Any]], tokens: int, indices: list[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropy over the trained tokens of the global batch.

    Args:
        rows: the global batch. tokens: those that it trains on.
        indices: of the micro-batch's rows in the global batch.
    """
    assert strategy.module is not None
    batch = collate([rows[i] for i in indices], strategy.device)  # (b,S) each
    logprobs = strategy.module(*batch)  # (b,S)
    total, _ = sft_loss(logprobs, batch.loss_mask, denominator=tokens)
    return total, {}
