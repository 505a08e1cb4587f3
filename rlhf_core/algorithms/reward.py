"""Reward model: a scalar head trained on preference pairs (InstructGPT, step 2).

b pairs of a micro-batch, S positions.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.errors import DataError
from rlhf_core.evaluation.reward_accuracy import accuracy_report, heldout_margins
from rlhf_core.jobs import RewardJob
from rlhf_core.losses.reductions import Metrics
from rlhf_core.losses.supervised import pairwise_loss
from rlhf_core.models.loading import new_scalar_model
from rlhf_core.models.saving import save_scalar_model
from rlhf_core.nn.layers import choose_trainable
from rlhf_core.nn.modules import ScalarModel
from rlhf_core.nn.shared_prompt import LONGEST, collate_shared, shared_length, takes_block_masks
from rlhf_core.runtime.context import StageContext
from rlhf_core.store import Artifact
from rlhf_core.training.batching import batch_rows, split_batch, steps_in
from rlhf_core.training.calibration import score_mean_and_std, sft_replies
from rlhf_core.training.checkpoint import Checkpointer
from rlhf_core.training.length import length_differences, length_weight
from rlhf_core.training.optimizer import adamw
from rlhf_core.training.policy import enable_checkpointing, frozen_storage
from rlhf_core.training.preference import collate_pairs, pair_length
from rlhf_core.training.probe import probe_head
from rlhf_core.training.schedule import set_learning_rate
from rlhf_core.training.strategy import Strategy
from rlhf_core.training.updates import update_on_batch


def run(job: RewardJob, context: StageContext) -> Artifact | None:
    """Train, normalise, compare with baselines, publish. Rank 0 returns the artifact."""
    micro_batch_size = job.resources.micro_batch_size
    strategy = Strategy(job.resources, job.precision, job.max_grad_norm)
    source, data = context.store.fetch(job.model), context.store.fetch(job.data)
    train = Rows(data, "train", purpose="preference")
    heldout = Rows(data, "heldout", purpose="preference")
    per_token = 0.0
    if job.length_debias:
        per_token = length_weight(length_differences(train), context.log)
    # Replies of the SFT model, before its weights change, to normalise the scores with.
    calibration = sft_replies(job, context, strategy, source, train)

    module = prepare_reward_model(job, context, strategy, source, train)
    checkpointer = Checkpointer(context, strategy, job)
    total = steps_in(train, job.batch_size, job.epochs, job.max_steps)
    start, _ = checkpointer.restore()

    for step in range(start, total):
        began = time.perf_counter()
        # 1. The global batch of pairs.
        rows = train.take(batch_rows(train, job.batch_size, step, job.seed))
        learning_rate = set_learning_rate(job, strategy, checkpointer, step, total)
        # 2. Update. Both replies of a pair go through the model in one pass, and in one row if it
        # can.
        one_row = in_one_row(job, module, rows)
        micro_batches = split_batch(
            [shared_length(row) if one_row else pair_length(row) for row in rows],
            strategy.group, micro_batch_size,
        )  # fmt: skip
        metrics = update_on_batch(
            strategy, checkpointer, step, rows, micro_batches,
            partial(loss, job, strategy, rows, loss_margins(job, rows, per_token), one_row),
        )  # fmt: skip
        # 3. Report and save.
        metrics |= {
            "learning_rate": learning_rate,
            "pairs_per_second": len(rows) / (time.perf_counter() - began),
        }
        context.log_metrics(step + 1, total, metrics)
        checkpointer.after_step(step + 1, total)

    mean, std = score_mean_and_std(module, calibration, strategy, micro_batch_size)
    margins = heldout_margins(module, heldout, strategy, micro_batch_size)
    weights = strategy.weights(keep=context.main)
    whole = strategy.unsharded(module, weights, keep=context.main)
    if not context.main:
        checkpointer.finish()
        return None
    assert isinstance(whole, ScalarModel)
    # Scores to mean 0, standard deviation 1 over the SFT replies.
    whole.mean, whole.std = mean, max(std, 1e-6)
    report = accuracy_report(margins, train, heldout, context.log)
    metrics = {"steps": total, "score_mean": mean, "score_std": std, "heldout": report}
    return publish(job, context, checkpointer, whole, source, metrics)


def prepare_reward_model(
    job: RewardJob, context: StageContext, strategy: Strategy, source: Path, train: Rows
) -> ScalarModel:
    """The SFT model's backbone with a fresh head, or one that a linear probe starts, and with its
    optimizer, distributed over the ranks."""
    module = new_scalar_model(source, job.seed, *frozen_storage(job, strategy))
    module.pooling = job.pooling
    probe = partial(probe_head, module, train, strategy, job.resources.micro_batch_size, context)
    if job.head == "probe" and not strategy.sharded:
        probe()
    module.backbone = choose_trainable(module.backbone, job, job.seed)
    if job.resources.gradient_checkpointing:
        enable_checkpointing(module.backbone)
    strategy.prepare(module, adamw(module, job, {"": job.learning_rate}))
    if job.head == "probe" and strategy.sharded:  # before, no device could hold the module
        probe()
    return module


def in_one_row(job: RewardJob, module: ScalarModel, rows: Sequence[dict[str, Any]]) -> bool:
    """Whether the pairs of a batch share rows, so that their prompts are computed once."""
    if max(shared_length(r) for r in rows) > LONGEST or not all(r["prompt_ids"] for r in rows):
        return False
    return takes_block_masks(module.backbone)


def loss_margins(
    job: RewardJob, rows: Sequence[Mapping[str, Any]], per_token: float
) -> Tensor | None:
    """The margins (B,) of the loss for a global batch: those of its pairs, less the logit that
    their lengths explain; None where neither is used.

    Args:
        per_token: see `length_weight`.

    Raises:
        DataError: the pairs have no margins.
    """
    if not job.margin_coef and not per_token:
        return None
    if job.margin_coef and "margin" not in rows[0]:
        raise DataError(
            f"reward.margin_coef is {job.margin_coef:g}, but the preference data has no column "
            "margin; name it with data.preference.columns: {margin: <its name>}, or set "
            "margin_coef to 0."
        )
    longer = [len(r["chosen_ids"]) - len(r["rejected_ids"]) for r in rows]
    own = [job.margin_coef * r["margin"] if job.margin_coef else 0.0 for r in rows]
    return torch.tensor([m - per_token * n for m, n in zip(own, longer, strict=True)])


def loss(
    job: RewardJob,
    strategy: Strategy,
    rows: Sequence[dict[str, Any]],
    margins: Tensor | None,
    one_row: bool,
    indices: list[int],
) -> tuple[Tensor, Metrics]:
    """Bradley-Terry loss of the pairs at some indices of the global batch.

    Args:
        rows: the global batch. margins: (B,) of its pairs, see `loss_margins`.
        one_row: see `in_one_row`.
    """
    assert strategy.module is not None
    pairs = [rows[i] for i in indices]
    if one_row:
        input_ids, positions, segments = collate_shared(pairs, strategy.device)  # (b,S) each
        scores = strategy.module(input_ids, positions, segments=segments)  # (2b,)
    else:
        scores = strategy.module(*collate_pairs(pairs, strategy.device))  # (2b,)
    chosen, rejected = scores.chunk(2)  # (b,) each
    return pairwise_loss(
        chosen, rejected, job.loss,
        margins=None if margins is None else margins[indices].to(strategy.device),
        center_coef=job.center_coef, denominator=float(len(rows)),
    )  # fmt: skip


def publish(
    job: RewardJob,
    context: StageContext,
    checkpointer: Checkpointer,
    whole: ScalarModel,
    source: Path,
    metrics: dict[str, Any],
) -> Artifact:
    """The stage's result. Rank 0 only."""
    folder = context.scratch("result")
    save_scalar_model(whole, folder, source)
    artifact = context.publish(job, folder, {"metrics": metrics})
    checkpointer.finish()
    return artifact
