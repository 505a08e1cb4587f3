"""Kahneman-Tversky optimisation (KTO, arXiv 2402.01306): single replies marked good or bad.

How far a reply's log-ratio is above or below z decides how much it counts. z is the KL between
policy and reference, estimated as in the paper (section 4.1) from replies to other prompts: each
prompt of the global batch with the reply of the next row. Deviation: the next row with *another*
prompt, since halves of one pair, or several replies to a prompt, would match.

b rows of a micro-batch, S positions.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.jobs import KTOJob
from rlhf_core.losses.preference import kto_loss
from rlhf_core.losses.reductions import Metrics, sequence_logps
from rlhf_core.models.loading import load_causal_lm
from rlhf_core.nn.modules import Policy
from rlhf_core.nn.padding import flat_indices, to_device
from rlhf_core.runtime.context import StageContext
from rlhf_core.store import Artifact
from rlhf_core.training.batching import batch_rows, split_batch, steps_in
from rlhf_core.training.checkpoint import Checkpointer
from rlhf_core.training.policy import frozen_storage, prepare_policy, publish_policy
from rlhf_core.training.preference import by_source, collate_replies, heldout_metrics
from rlhf_core.training.schedule import set_learning_rate
from rlhf_core.training.selection import LOWEST_LOSS, Selection
from rlhf_core.training.strategy import Strategy
from rlhf_core.training.unpaired import (
    Combination,
    LabelledReplies,
    Logps,
    as_reply,
    combination_logps,
    matched,
    means_by_label,
    mismatched,
    needed_combinations,
    reply_length,
)
from rlhf_core.training.updates import update_on_batch


def run(job: KTOJob, context: StageContext) -> Artifact | None:
    """Train, evaluate on held-out rows, publish. Every rank calls; rank 0 returns the artifact."""
    strategy = Strategy(job.resources, job.precision, job.max_grad_norm)
    source, data = context.store.fetch(job.model), context.store.fetch(job.data)
    train, heldout = (
        LabelledReplies(Rows(data, split, purpose=("unpaired", "preference")))
        for split in ("train", "heldout")
    )
    total = steps_in(train, job.batch_size, job.epochs, job.max_steps)
    needed = needed_combinations(train, job, total)
    module = prepare_policy(job, load_causal_lm(source, *frozen_storage(job, strategy)), strategy)
    # The reference is this very model before its weights change.
    began = time.perf_counter()
    reference = combination_logps(module, train, needed, strategy, job)
    heldout_reference = heldout_logps(module, heldout, strategy, job)
    context.log(
        f"reference log-probabilities of {len(reference) + len(heldout_reference)} replies in "
        f"{time.perf_counter() - began:.1f} s"
    )
    checkpointer = Checkpointer(context, strategy, job)
    start, _ = checkpointer.restore()
    evaluate = partial(heldout_results, job, strategy, module, heldout, heldout_reference)
    selection = Selection(job, checkpointer, LOWEST_LOSS, len(heldout))

    for step in selection.steps(start, total):
        began = time.perf_counter()
        # 1. The global batch.
        numbers = batch_rows(train, job.batch_size, step, job.seed)
        rows = train.take(numbers)
        learning_rate = set_learning_rate(job, strategy, checkpointer, step, total)
        # 2. z: the KL to the reference, from replies to other prompts; without a gradient.
        others = mismatched(rows, numbers)
        logps = combination_logps(module, train, others, strategy, job)
        kl = mean_log_ratio(logps, reference, others)
        # 3. Update.
        micro_batches = split_batch(
            [reply_length(row) for row in rows],
            strategy.group, job.resources.micro_batch_size, strategy.padding,
        )  # fmt: skip
        ref_logps = torch.tensor([reference[number, number] for number in numbers])  # (B,)
        metrics = update_on_batch(
            strategy, checkpointer, step, rows, micro_batches,
            partial(loss_of_micro_batch, job, strategy, rows, ref_logps, kl),
        )  # fmt: skip
        # 4. Report, evaluate and save.
        tokens_per_second = sum(map(reply_length, rows)) / (time.perf_counter() - began)
        selection.after_step(
            step + 1, total,
            {**means_by_label(metrics, rows), "kl": kl, "learning_rate": learning_rate,
             "tokens_per_second": tokens_per_second},
            evaluate,
        )  # fmt: skip

    result = {"metrics": selection.heldout(total, evaluate)}
    return publish_policy(job, context, strategy, checkpointer, module, source, result)


def loss_of_micro_batch(
    job: KTOJob,
    strategy: Strategy,
    rows: Sequence[Mapping[str, Any]],
    ref_logps: Tensor,
    kl: float,
    indices: list[int],
) -> tuple[Tensor, Metrics]:
    """Forward pass and loss of the rows at some indices of the global batch.

    Args:
        rows: the global batch. ref_logps: (B,) of its responses. kl: the estimate of z.
    """
    assert strategy.module is not None
    mine = [rows[i] for i in indices]
    batch = collate_replies([as_reply(row, row) for row in mine], strategy.device)  # (b,S) each
    logps = sequence_logps(strategy.module(*batch), batch.loss_mask)  # (b,)
    return loss(job, logps, ref_logps[indices], mine, kl, len(rows))


def loss(
    job: KTOJob,
    logps: Tensor,
    ref_logps: Tensor,
    rows: Sequence[Mapping[str, Any]],
    kl: float,
    count: int,
) -> tuple[Tensor, Metrics]:
    """Equation 8, and with its metrics the sums of the implicit rewards of good and of bad rows.

    Args:
        logps, ref_logps: (b,) log-probabilities of the responses, of policy and reference.
        count: rows of the global batch.
    """
    label = torch.tensor([bool(row["label"]) for row in rows])  # (b,)
    good, bad = (to_device(flat_indices(x), logps.device) for x in (label, ~label))
    label = to_device(label, logps.device)
    ref_logps = to_device(ref_logps, logps.device)  # (b,)
    total, metrics = kto_loss(
        logps, ref_logps, label, kl, job.beta, job.desirable_weight, job.undesirable_weight,
        denominator=float(count),
    )  # fmt: skip
    rewards = job.beta * (logps.detach() - ref_logps)  # (b,)
    metrics["chosen_reward"] = rewards[good].sum()
    metrics["rejected_reward"] = rewards[bad].sum()
    return total, metrics


def mean_log_ratio(logps: Logps, reference: Logps, combinations: Sequence[Combination]) -> float:
    """The estimate of KL(policy || reference) in nats; one below 0 counts as 0 in the loss."""
    return sum(logps[c] - reference[c] for c in combinations) / len(combinations)


def heldout_logps(
    module: Policy, heldout: LabelledReplies, strategy: Strategy, job: KTOJob
) -> Logps:
    """Log-probabilities of all held-out responses, after their own prompts and after others'."""
    numbers = range(len(heldout))
    combinations = [*matched(numbers), *mismatched(heldout.take(numbers), numbers)]
    return combination_logps(module, heldout, combinations, strategy, job)


def heldout_results(
    job: KTOJob, strategy: Strategy, module: Policy, heldout: LabelledReplies, reference: Logps
) -> dict[str, float]:
    """Loss, accuracy, margin and KL on the held-out rows, the first three also on those of each
    source of a mixture, with the KL of all; empty without any."""
    numbers = range(len(heldout))
    if not numbers:
        return {}
    rows = heldout.take(numbers)
    found = heldout_logps(module, heldout, strategy, job)
    kl = mean_log_ratio(found, reference, mismatched(rows, numbers))
    logps, ref_logps = (
        torch.tensor([logps[number, number] for number in numbers], dtype=torch.float64)
        for logps in (found, reference)
    )  # (m,) each

    def measure(some: list[int]) -> dict[str, float]:
        taken = [rows[i] for i in some]
        return heldout_metrics(*loss(job, logps[some], ref_logps[some], taken, kl, len(some)))

    return by_source(heldout.sources, measure, numbers) | {"heldout_kl": kl}
