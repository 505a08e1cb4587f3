"""Supervised fine-tuning: cross-entropy on the assistant's tokens (InstructGPT, step 1)."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_core.batching import batch_rows, learning_rate_scale, pad_right, split_batch, steps_in
from rlhf_core.checkpoint import Checkpointer
from rlhf_core.context import StageContext
from rlhf_core.data.reading import Rows
from rlhf_core.distributed import Group
from rlhf_core.errors import NonFinite
from rlhf_core.jobs import SFTJob
from rlhf_core.losses import sft_loss
from rlhf_core.models import Policy, load_causal_lm
from rlhf_core.nonfinite import failure
from rlhf_core.store import Artifact
from rlhf_core.strategy import Strategy
from rlhf_core.train.policy import prepare_policy, publish_policy


def run(job: SFTJob, context: StageContext) -> Artifact | None:
    """Train, evaluate on held-out rows, publish. Every rank calls; rank 0 returns the artifact."""
    resources = job.resources
    strategy = Strategy(resources, job.precision, job.max_grad_norm)
    source = context.store.fetch(job.model)
    data = context.store.fetch(job.data)
    train = Rows(data, "train", purpose="sft")
    heldout = Rows(data, "heldout", purpose="sft")

    module = prepare_policy(job, load_causal_lm(source), strategy)
    checkpointer = Checkpointer(context, strategy, job)
    total = steps_in(len(train), job.batch_size, job.epochs, job.max_steps)
    start, _ = checkpointer.restore()

    for step in range(start, total):
        began = time.perf_counter()
        # 1. The global batch; every rank knows all of it, so the denominator needs no exchange.
        rows = train.take(batch_rows(len(train), job.batch_size, step, job.seed))
        tokens = sum(trained_tokens(row) for row in rows)
        scale = learning_rate_scale(step, total, job.warmup_fraction, job.schedule)
        scale *= checkpointer.rate
        strategy.set_learning_rate(scale)
        # 2. Forward and backward over this rank's micro-batches.
        micro = split_batch(
            [len(r["input_ids"]) for r in rows],
            strategy.rank, strategy.world_size, resources.micro_batch_size, strategy.padding,
        )  # fmt: skip
        loss_sum = 0.0
        try:
            for i, positions in enumerate(micro):
                batch = collate([rows[p] for p in positions], strategy.device)
                with strategy.micro_batch(last=i == len(micro) - 1):
                    logprobs = strategy.module(*batch)  # (B,S)
                    loss, _ = sft_loss(logprobs, batch[2], denominator=tokens)
                    strategy.backward(loss)
                loss_sum += loss.item()
            # 3. Update.
            grad_norm = strategy.step()
        except NonFinite as error:
            raise failure(error, checkpointer, step + 1, rows, positions) from error
        # 4. Report and save.
        seconds = time.perf_counter() - began
        context.log_metrics(
            step + 1, total,
            {
                "loss": float(strategy.group.sum([loss_sum])[0]),
                "learning_rate": job.learning_rate * scale,
                "grad_norm": grad_norm,
                "tokens_per_second": sum(len(r["input_ids"]) for r in rows) / seconds,
            },
        )  # fmt: skip
        checkpointer.after_step(step + 1, total)

    metrics = heldout_loss(module, heldout, strategy.group, resources.micro_batch_size, strategy)
    context.log("  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
    result = {"metrics": {"steps": total, **metrics}}
    return publish_policy(job, context, strategy, checkpointer, module, source, result)


def trained_tokens(row: dict[str, Any]) -> int:
    """Tokens of a row that have a loss; the first token has no predictor."""
    return sum(row["trainable"][1:])


def collate(rows: Sequence[dict[str, Any]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids (B,S), mask (B,S) bool, marked (B,S) bool of rows with a trainable mask."""
    input_ids, mask = pad_right([r["input_ids"] for r in rows])
    marked, _ = pad_right([r["trainable"] for r in rows])
    marked[:, 0] = 0
    return input_ids.to(device), mask.to(device), marked.bool().to(device)


@torch.no_grad()
def heldout_loss(
    module: Policy, rows: Rows, group: Group, micro_batch_size: int, strategy: Strategy | None
) -> dict[str, float]:
    """Held-out loss (nats per trained token) and perplexity; empty when nothing was held out."""
    if len(rows) == 0:
        return {}
    sums = torch.zeros(2, dtype=torch.float64)  # loss, tokens
    lengths = rows.lengths("input_ids").tolist()
    for positions in split_batch(lengths, group.rank, group.size, micro_batch_size):
        batch = collate(rows.take(positions), group.device)
        with strategy.autocast() if strategy else contextlib.nullcontext():
            logprobs = module(*batch)
        sums += torch.tensor([-logprobs.double().sum().item(), batch[2].sum().item()])
    return loss_per_token(group.sum(sums))


def loss_per_token(total: Tensor) -> dict[str, float]:
    """Held-out loss and perplexity from the sums (2,) of losses and of tokens."""
    loss = float(total[0] / total[1])
    return {"heldout_loss": loss, "heldout_perplexity": math.exp(min(loss, 700.0))}
