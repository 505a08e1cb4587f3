"""What DPO, SimPO and ORPO have in common: stages that train a policy on preference pairs.

b pairs of a micro-batch, n of a data set, S positions. A tensor (b,2) has a column for the chosen
responses and one for the rejected ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.jobs import PreferenceJob
from rlhf_core.losses.reductions import Metrics, sequence_logps
from rlhf_core.models.loading import load_causal_lm
from rlhf_core.nn.modules import Policy
from rlhf_core.runtime.context import StageContext
from rlhf_core.training.batching import batch_rows, split_batch, steps_in
from rlhf_core.training.checkpoint import Checkpointer
from rlhf_core.training.policy import frozen_storage, prepare_policy
from rlhf_core.training.preference import (
    by_pair,
    by_source,
    collate_replies,
    heldout_metrics,
    pair_length,
    pair_logps,
    pair_replies,
    pair_response_lengths,
    pair_tokens,
    visited,
)
from rlhf_core.training.schedule import set_learning_rate
from rlhf_core.training.selection import Evaluate, Selection
from rlhf_core.training.strategy import Strategy
from rlhf_core.training.updates import update_on_batch


@dataclass(frozen=True)
class PairStage:
    """What every step of a stage on preference pairs works with."""

    job: PreferenceJob
    context: StageContext
    strategy: Strategy
    source: Path  # folder of the model that the policy starts from
    train: Rows
    heldout: Rows
    module: Policy
    total: int  # optimizer steps


@dataclass(frozen=True)
class PairBatch:
    """The pairs of a step over all ranks, on every rank."""

    numbers: list[int]  # of the rows in the data set
    rows: list[dict[str, Any]]
    began: float  # time.perf_counter() when the step began


@dataclass(frozen=True)
class ScoredPairs:
    """What a loss sees of b pairs."""

    numbers: list[int]  # of the rows in the data set
    logps: Tensor  # (b,2) log-probability of each response (nats, sum over its tokens)
    lengths: Tensor  # (b,2) tokens of each response
    pairs: int  # of the global batch, by which sums are divided
    chosen_tokens: int  # of the chosen responses of the global batch

    def take(self, indices: Sequence[int]) -> ScoredPairs:
        """The pairs at these indices, as a batch of their own."""
        some = torch.tensor(indices)
        return ScoredPairs(
            numbers=[self.numbers[i] for i in indices],
            logps=self.logps[some],
            lengths=self.lengths[some],
            pairs=len(indices),
            chosen_tokens=int(self.lengths[some, 0].sum()),
        )


Loss = Callable[[ScoredPairs], tuple[Tensor, Metrics]]


def prepare_pairs(job: PreferenceJob, context: StageContext) -> PairStage:
    """Load the data set and the policy, with its optimizer. Every rank calls."""
    strategy = Strategy(job.resources, job.precision, job.max_grad_norm)
    source = context.store.fetch(job.model)
    data = context.store.fetch(job.data)
    train = Rows(data, "train", purpose="preference")
    heldout = Rows(data, "heldout", purpose="preference")
    module = prepare_policy(job, load_causal_lm(source, *frozen_storage(job, strategy)), strategy)
    total = steps_in(train, job.batch_size, job.epochs, job.max_steps)
    return PairStage(job, context, strategy, source, train, heldout, module, total)


def reference_logps(stage: PairStage) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the untrained policy for the training pairs (n,2), NaN in rows that are
    not trained on, and for the held-out ones (m,2).

    Call it before a checkpoint is restored: a stage that goes on must be held to the same
    reference, not to a half-trained model. No second model is in memory for it, then or later.
    """
    began = time.perf_counter()
    numbers = visited(stage.train, stage.job, stage.total)
    micro = stage.job.resources.micro_batch_size
    reference = pair_logps(stage.module, stage.train, numbers, stage.strategy, micro)
    heldout_reference = heldout_logps(stage)
    stage.context.log(
        f"reference log-probabilities of {len(numbers) + len(stage.heldout)} pairs in "
        f"{time.perf_counter() - began:.1f} s"
    )
    return reference, heldout_reference


def take_pairs(stage: PairStage, step: int) -> PairBatch:
    """The global batch of a step (from 0)."""
    began, job = time.perf_counter(), stage.job
    numbers = batch_rows(stage.train, job.batch_size, step, job.seed)
    return PairBatch(numbers, stage.train.take(numbers), began)


def update_on_pairs(
    stage: PairStage, checkpointer: Checkpointer, step: int, batch: PairBatch, loss: Loss
) -> dict[str, float]:
    """One optimizer step. The chosen and rejected responses of a pair go through the model in one
    pass.

    Returns:
        The metrics of `update_on_batch`, and learning_rate.
    """
    job, strategy = stage.job, stage.strategy
    learning_rate = set_learning_rate(job, strategy, checkpointer, step, stage.total)
    micro_batches = split_batch(
        [pair_length(row) for row in batch.rows], strategy.group,
        job.resources.micro_batch_size, strategy.padding,
    )  # fmt: skip
    metrics = update_on_batch(
        strategy, checkpointer, step, batch.rows, micro_batches,
        partial(loss_of_micro_batch, strategy, batch, loss),
    )  # fmt: skip
    return metrics | {"learning_rate": learning_rate}


def loss_of_micro_batch(
    strategy: Strategy, batch: PairBatch, loss: Loss, indices: list[int]
) -> tuple[Tensor, Metrics]:
    """Forward pass and loss of the pairs at some indices of the global batch."""
    assert strategy.module is not None
    replies = pair_replies([batch.rows[i] for i in indices])
    micro_batch = collate_replies(replies, strategy.device)  # (2b,S) each
    logprobs = strategy.module(*micro_batch)  # (2b,S)
    return loss(
        ScoredPairs(
            numbers=[batch.numbers[i] for i in indices],
            logps=by_pair(sequence_logps(logprobs, micro_batch.loss_mask)),
            lengths=by_pair(micro_batch.loss_mask.sum(dim=1)),
            pairs=len(batch.rows),
            chosen_tokens=sum(len(row["chosen_ids"]) for row in batch.rows),
        )
    )


def report_and_save(
    stage: PairStage,
    selection: Selection,
    step: int,
    batch: PairBatch,
    metrics: Mapping[str, float],
    evaluate: Evaluate,
) -> None:
    """What `Selection.after_step` does, with the step's throughput. Every rank calls."""
    seconds = time.perf_counter() - batch.began
    tokens = sum(pair_tokens(row) for row in batch.rows)
    metrics = {**metrics, "tokens_per_second": tokens / seconds}
    selection.after_step(step + 1, stage.total, metrics, evaluate)


def heldout_logps(stage: PairStage) -> Tensor:
    """The policy's log-probabilities (m,2) of the held-out pairs."""
    numbers, micro = range(len(stage.heldout)), stage.job.resources.micro_batch_size
    return pair_logps(stage.module, stage.heldout, numbers, stage.strategy, micro)


def evaluate_pairs(stage: PairStage, loss: Loss) -> dict[str, float]:
    """Loss, accuracy and margin on the held-out pairs, also on those of each source of a mixture;
    empty without any."""
    if not len(stage.heldout):
        return {}
    pairs = score_heldout(stage)
    return by_source(
        stage.heldout.sources, lambda some: heldout_metrics(*loss(pairs.take(some))), pairs.numbers
    )


def score_heldout(stage: PairStage) -> ScoredPairs:
    """What a loss sees of all held-out pairs."""
    lengths = pair_response_lengths(stage.heldout)  # (m,2)
    return ScoredPairs(
        numbers=list(range(len(stage.heldout))),
        logps=heldout_logps(stage),
        lengths=lengths,
        pairs=len(stage.heldout),
        chosen_tokens=int(lengths[:, 0].sum()),
    )
