"""Pretraining: next-token prediction on plain text, from any model or one made from scratch.

The text is packed (see `rlhf_core.training.packing`): documents follow each other with an
end-of-text token between them, in sequences of one length, and every token is trained on once
per epoch. Attention stays within a document where the architecture can do that (llama, qwen2, gpt2
and similar ones; a trial run tells); for the others the sequences are read as one text across
documents, as GPT-3 was trained (arXiv 2005.14165, section 2.4), and the log and the result's
metadata say so.

Two things differ from supervised fine-tuning: the last batch of an epoch holds what is left,
instead of being dropped, and its loss is the mean over its own tokens.

b sequences of a micro-batch, S positions.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.data.encoding.tokenizer import load_tokenizer
from rlhf_core.errors import ConfigError
from rlhf_core.jobs import PretrainJob
from rlhf_core.losses.supervised import sft_loss
from rlhf_core.model_files.remote_code import is_trusted
from rlhf_core.models.loading import load_causal_lm
from rlhf_core.nn.modules import Policy
from rlhf_core.runtime.context import StageContext
from rlhf_core.store import Artifact
from rlhf_core.training.batching import scoring_passes, split_batch
from rlhf_core.training.checkpoint import Checkpointer
from rlhf_core.training.language_modelling import loss_and_tokens, loss_per_token, sum_of_losses
from rlhf_core.training.packing import (
    Packed,
    PackedSources,
    batch_sequences,
    collate,
    separates_documents,
    steps_per_epoch,
)
from rlhf_core.training.policy import frozen_storage, prepare_policy, publish_policy
from rlhf_core.training.schedule import set_learning_rate
from rlhf_core.training.selection import LOWEST_LOSS, Selection
from rlhf_core.training.strategy import Strategy
from rlhf_core.training.updates import update_on_batch


def run(job: PretrainJob, context: StageContext) -> Artifact | None:
    """Train, evaluate on held-out text, publish. Every rank calls; rank 0 returns the artifact.

    Raises:
        ConfigError: the packed sequences are longer than the model can read.
    """
    resources = job.resources
    strategy = Strategy(resources, job.precision, job.max_grad_norm)
    source = context.store.fetch(job.model)
    train, heldout = packings(job, source, context.store.fetch(job.data))
    if train.plan is not None:
        sequences = [len(packing) for packing in train.parts.values()]
        context.log(f"in packed sequences, {train.plan.describe(sequences)}")

    model = load_causal_lm(source, *frozen_storage(job, strategy))
    check_length(model, job.length)
    separate = strategy.group.broadcast(separates_documents(model) if strategy.loads else None)
    if not separate:
        context.log(f"{type(model).__name__} reads packed documents as one text")
    module = prepare_policy(job, model, strategy)
    checkpointer = Checkpointer(context, strategy, job)
    total = steps_per_epoch(train, job.batch_size) * job.epochs
    total = total if job.max_steps is None else min(total, job.max_steps)
    start, _ = checkpointer.restore()
    evaluate = partial(
        heldout_loss, module, heldout, strategy, resources.micro_batch_size, separate
    )
    selection = Selection(job, checkpointer, LOWEST_LOSS, len(heldout))

    for step in selection.steps(start, total):
        began = time.perf_counter()
        # 1. The global batch; every rank knows all of it, so the denominator needs no exchange.
        numbers = batch_sequences(train, job.batch_size, step, job.seed)
        batch = [train[n] for n in numbers]
        tokens = sum(sequence.tokens for sequence in batch)
        # An epoch's last batch may not divide by the ranks; each needs as many backward passes.
        batch += [Packed([train.end], [0], [False])] * (-len(batch) % strategy.world_size)
        learning_rate = set_learning_rate(job, strategy, checkpointer, step, total)
        # 2. Update.
        micro_batches = split_batch(
            [len(sequence.ids) for sequence in batch],
            strategy.group, resources.micro_batch_size,
        )  # fmt: skip
        metrics = update_on_batch(
            strategy, checkpointer, step, [vars(sequence) for sequence in batch], micro_batches,
            partial(loss, strategy, batch, tokens, separate),
        )  # fmt: skip
        # 3. Report, evaluate and save.
        metrics |= {
            "learning_rate": learning_rate,
            "tokens_per_second": tokens / (time.perf_counter() - began),
        }
        selection.after_step(step + 1, total, metrics, evaluate)

    result = {
        "metrics": {"sequences": len(train), **selection.heldout(total, evaluate)},
        "documents_separated": separate,
    }
    return publish_policy(job, context, strategy, checkpointer, module, source, result)


def loss(
    strategy: Strategy,
    batch: Sequence[Packed],
    tokens: int,
    separate: bool,
    indices: list[int],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropy over all tokens of the global batch.

    Args:
        batch: the global batch. tokens: those that it trains on.
        separate: keep the documents of a sequence apart.
        indices: of the micro-batch's sequences in the global batch.
    """
    assert strategy.module is not None
    input_ids, mask, loss_mask, index, positions = collate(
        [batch[i] for i in indices], strategy.device, separate=separate
    )  # (b,S) each
    logprobs = strategy.module(input_ids, mask, loss_mask, index, position_ids=positions)  # (b,S)
    total, _ = sft_loss(logprobs, loss_mask, denominator=max(tokens, 1))
    return total, {}


def packings(job: PretrainJob, source: Path, data: Path) -> tuple[PackedSources, PackedSources]:
    """The packed training and held-out text.

    Raises:
        ConfigError: the data set has a curriculum.
    """
    tokenizer = load_tokenizer(source, trust_remote_code=is_trusted(source))
    end = tokenizer.eos_token_id
    assert end is not None, f"the import of {source} lets no tokenizer through that has no eos"
    train, heldout = (Rows(data, side, purpose="pretrain") for side in ("train", "heldout"))
    if train.sampling is not None and train.sampling.order_by is not None:
        raise ConfigError(
            "the data set has a curriculum, but pretraining packs documents end to end in one "
            "order: clear data.pretrain.curriculum."
        )
    return PackedSources(train, end, job.length), PackedSources(heldout, end, job.length)


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
    module: Policy, packed: PackedSources, strategy: Strategy, micro_batch_size: int, separate: bool
) -> dict[str, float]:
    """Held-out loss (nats per token), also of each source of a mixture, and perplexity; empty
    without held-out text."""
    if len(packed) == 0:
        return {}
    group, sums = strategy.group, {}
    for source, packing in packed.parts.items():
        found = []
        for numbers, counts in scoring_passes(packing.lengths(), group, micro_batch_size):
            input_ids, mask, loss_mask, index, positions = collate(
                [packing[n] for n in numbers], group.device, separate=separate
            )
            with strategy.autocast():
                logprobs = module(input_ids, mask, loss_mask, index, position_ids=positions)
            if counts:
                found.append(loss_and_tokens(logprobs, index))
        sums[source] = sum_of_losses(found, group)
    return loss_per_token(sums)
