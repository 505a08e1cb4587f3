"""Pretraining: next-token prediction on plain text, from any model or one made from nothing.

The text is packed (see `rlhf_core.training.packing`): documents follow each other with an
end-of-text token between them, in sequences of one length, and every token is trained on once
per epoch. Attention stays within a document where the architecture can do that (llama, qwen2, gpt2
and their like; it is tried out); for the others the sequences are read as one text across
documents, as GPT-3 was trained (arXiv 2005.14165, section 2.4), and the log and the result's
metadata say so.

Two things differ from supervised fine-tuning: the last batch of an epoch holds what is left,
instead of being dropped, and its loss is the mean over its own tokens.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.data.encoding.tokenizer import load_tokenizer
from rlhf_core.errors import ConfigError, NonFinite
from rlhf_core.jobs import PretrainJob
from rlhf_core.losses.supervised import sft_loss
from rlhf_core.model_files.remote_code import is_trusted
from rlhf_core.models.loading import load_causal_lm
from rlhf_core.nn.modules import Policy
from rlhf_core.runtime.context import StageContext
from rlhf_core.store import Artifact
from rlhf_core.training.batching import learning_rate_scale, split_batch
from rlhf_core.training.checkpoint import Checkpointer
from rlhf_core.training.language_modelling import loss_per_token
from rlhf_core.training.nonfinite import failure
from rlhf_core.training.packing import (
    Packed,
    Packing,
    batch_sequences,
    collate,
    separates_documents,
    steps_per_epoch,
)
from rlhf_core.training.policy import prepare_policy, publish_policy
from rlhf_core.training.strategy import Strategy


def run(job: PretrainJob, context: StageContext) -> Artifact | None:
    """Train, evaluate on held-out text, publish. Every rank calls; rank 0 returns the artifact.

    Raises:
        ConfigError: the packed sequences are longer than the model can read.
    """
    resources = job.resources
    strategy = Strategy(resources, job.precision, job.max_grad_norm)
    source = context.store.fetch(job.model)
    train, heldout = packings(job, source, context.store.fetch(job.data))

    model = load_causal_lm(source)
    check_length(model, job.length)
    separate = separates_documents(model)
    if not separate:
        context.log(f"{type(model).__name__} reads packed documents as one text")
    module = prepare_policy(job, model, strategy)
    checkpointer = Checkpointer(context, strategy, job)
    total = steps_per_epoch(len(train), job.batch_size) * job.epochs
    total = total if job.max_steps is None else min(total, job.max_steps)
    start, _ = checkpointer.restore()

    for step in range(start, total):
        began = time.perf_counter()
        # 1. The global batch; every rank knows all of it, so the denominator needs no exchange.
        batch = [train[i] for i in batch_sequences(len(train), job.batch_size, step, job.seed)]
        tokens = sum(sequence.tokens for sequence in batch)
        # An epoch's last batch may not divide by the ranks; each needs as many backward passes.
        batch += [Packed([train.end], [0], [False])] * (-len(batch) % strategy.world_size)
        scale = learning_rate_scale(step, total, job.warmup_fraction, job.schedule)
        scale *= checkpointer.rate
        strategy.set_learning_rate(scale)
        # 2. Forward and backward over this rank's micro-batches.
        micro = split_batch(
            [len(sequence.ids) for sequence in batch],
            strategy.rank, strategy.world_size, resources.micro_batch_size,
        )  # fmt: skip
        loss_sum = 0.0
        try:
            for i, numbers in enumerate(micro):
                input_ids, mask, loss_mask, positions = collate(
                    [batch[n] for n in numbers], strategy.device, separate=separate
                )
                with strategy.micro_batch(last=i == len(micro) - 1):
                    logprobs = strategy.module(  # (B,S)
                        input_ids, mask, loss_mask, position_ids=positions
                    )
                    loss, _ = sft_loss(logprobs, loss_mask, denominator=max(tokens, 1))
                    strategy.backward(loss)
                loss_sum += loss.item()
            # 3. Update.
            grad_norm = strategy.step()
        except NonFinite as error:
            rows = [vars(sequence) for sequence in batch]
            raise failure(error, checkpointer, step + 1, rows, numbers) from error
        # 4. Report and save.
        seconds = time.perf_counter() - began
        context.log_metrics(
            step + 1, total,
            {
                "loss": float(strategy.group.sum([loss_sum])[0]),
                "learning_rate": job.learning_rate * scale,
                "grad_norm": grad_norm,
                "tokens_per_second": tokens / seconds,
            },
        )  # fmt: skip
        checkpointer.after_step(step + 1, total)

    metrics = heldout_loss(module, heldout, strategy, resources.micro_batch_size, separate)
    context.log("  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
    result = {
        "metrics": {"steps": total, "sequences": len(train), **metrics},
        "documents_separated": separate,
    }
    return publish_policy(job, context, strategy, checkpointer, module, source, result)


def packings(job: PretrainJob, source: Path, data: Path) -> tuple[Packing, Packing]:
    """The packed training and held-out text."""
    tokenizer = load_tokenizer(source, trust_remote_code=is_trusted(source))
    end = tokenizer.eos_token_id
    assert end is not None, f"the import of {source} lets no tokenizer through that has no eos"
    train, heldout = (Rows(data, side, purpose="pretrain") for side in ("train", "heldout"))
    return Packing(train, end, job.length), Packing(heldout, end, job.length)


def check_length(model: Any, length: int) -> None:
    """Refuse sequences that are longer than the model can read.

    Raises:
        ConfigError: with both numbers.
    """
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise ConfigError(
            f"pretrain.length is {length:,}, but the model reads {longest:,} tokens at most: set "
            f"it to {longest:,} or less."
        )


@torch.no_grad()
def heldout_loss(
    module: Policy, packing: Packing, strategy: Strategy, micro_batch_size: int, separate: bool
) -> dict[str, float]:
    """Held-out loss (nats per token) and perplexity; empty when nothing was held out."""
    if len(packing) == 0:
        return {}
    sums = torch.zeros(2, dtype=torch.float64)  # loss, tokens
    group = strategy.group
    for numbers in split_batch(packing.lengths(), group.rank, group.size, micro_batch_size):
        input_ids, mask, loss_mask, positions = collate(
            [packing[n] for n in numbers], group.device, separate=separate
        )
        with strategy.autocast():
            logprobs = module(input_ids, mask, loss_mask, position_ids=positions)
        sums += torch.tensor([-logprobs.double().sum().item(), loss_mask.sum().item()])
    return loss_per_token(group.sum(sums))
