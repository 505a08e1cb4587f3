"""Supervised fine-tuning: cross-entropy on the assistant's tokens (InstructGPT, step 1)."""

from __future__ import annotations

import time

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.errors import NonFinite
from rlhf_core.jobs import SFTJob
from rlhf_core.losses.supervised import sft_loss
from rlhf_core.models.loading import load_causal_lm
from rlhf_core.runtime.context import StageContext
from rlhf_core.store import Artifact
from rlhf_core.training.batching import batch_rows, learning_rate_scale, split_batch, steps_in
from rlhf_core.training.checkpoint import Checkpointer
from rlhf_core.training.language_modelling import collate, heldout_loss, trained_tokens
from rlhf_core.training.nonfinite import failure
from rlhf_core.training.policy import prepare_policy, publish_policy
from rlhf_core.training.strategy import Strategy


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
