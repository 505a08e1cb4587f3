"""Reward model: a scalar head trained on preference pairs (InstructGPT, step 2)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.data.encoding.tokenizer import load_tokenizer
from rlhf_core.errors import NonFinite
from rlhf_core.evaluation import baselines
from rlhf_core.evaluation.statistics import accuracy
from rlhf_core.jobs import RewardJob
from rlhf_core.losses.supervised import pairwise_loss
from rlhf_core.model_files.remote_code import is_trusted
from rlhf_core.models.loading import load_causal_lm, new_scalar_model
from rlhf_core.models.saving import export, save_scalar_model, stop_tokens
from rlhf_core.nn.layers import choose_trainable
from rlhf_core.nn.modules import ScalarModel, last_real
from rlhf_core.nn.shared_prompt import LONGEST, collate_shared, shared_length, takes_block_masks
from rlhf_core.rollout.generate import generate, make_row_seeds
from rlhf_core.runtime.context import StageContext
from rlhf_core.store import Artifact
from rlhf_core.training.batching import batch_rows, learning_rate_scale, split_batch, steps_in
from rlhf_core.training.checkpoint import Checkpointer
from rlhf_core.training.nonfinite import failure
from rlhf_core.training.optimizer import adamw
from rlhf_core.training.policy import enable_checkpointing
from rlhf_core.training.preference import collate_pairs, pair_length
from rlhf_core.training.probe import fit_probe
from rlhf_core.training.scoring import score_sequences
from rlhf_core.training.strategy import Strategy


def run(job: RewardJob, context: StageContext) -> Artifact | None:
    """Train, normalise, compare with baselines, publish. Rank 0 returns the artifact."""
    resources = job.resources
    strategy = Strategy(resources, job.precision, job.max_grad_norm)
    source = context.store.fetch(job.model)
    data = context.store.fetch(job.data)
    train = Rows(data, "train", purpose="preference")
    heldout = Rows(data, "heldout", purpose="preference")

    # Replies of the SFT model, before its weights change, to normalise the scores with.
    calibration = sft_replies(job, context, strategy, source, train)

    module = new_scalar_model(source, job.seed)
    module.pooling = job.pooling
    if job.head == "probe":
        probe_head(module, train, strategy, resources.micro_batch_size, context)
    module.backbone = choose_trainable(module.backbone, job, job.seed)
    if resources.gradient_checkpointing:
        enable_checkpointing(module.backbone)
    strategy.prepare(module, adamw(module, job, {"": job.learning_rate}))
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
        # 2. Both replies of a pair go through the model in one pass, and in one row if it can.
        shared = in_one_row(job, module, rows)
        micro = split_batch(
            [shared_length(r) if shared else pair_length(r) for r in rows],
            strategy.rank, strategy.world_size, resources.micro_batch_size,
        )  # fmt: skip
        sums = torch.zeros(3, dtype=torch.float64)  # loss, accuracy, margin
        try:
            for i, positions in enumerate(micro):
                together = collate_shared if shared else collate_pairs
                batch = together([rows[p] for p in positions], strategy.device)
                with strategy.micro_batch(last=i == len(micro) - 1):
                    chosen, rejected = strategy.module(*batch).chunk(2)  # (b,), (b,)
                    loss, metrics = pairwise_loss(
                        chosen, rejected, job.loss, denominator=float(len(rows))
                    )
                    strategy.backward(loss)
                sums += torch.tensor([loss.item(), *(float(metrics[k]) for k in METRICS)])
            # 3. Update.
            grad_norm = strategy.step()
        except NonFinite as error:
            raise failure(error, checkpointer, step + 1, rows, positions) from error
        # 4. Report and save.
        loss_, accuracy_, margin = strategy.group.sum(sums).tolist()
        context.log_metrics(
            step + 1, total,
            {
                "loss": loss_, "accuracy": accuracy_, "margin": margin,
                "learning_rate": job.learning_rate * scale, "grad_norm": grad_norm,
                "pairs_per_second": len(rows) / (time.perf_counter() - began),
            },
        )  # fmt: skip
        checkpointer.after_step(step + 1, total)

    # Scores to mean 0, deviation 1 over the SFT replies.
    scores = score_all(module, calibration, strategy, resources.micro_batch_size)
    mean = float(scores.mean())
    std = float(scores.std()) if len(scores) > 1 else 1.0
    margins = heldout_margins(module, heldout, strategy, resources.micro_batch_size)
    weights = strategy.weights(keep=context.main)
    if not context.main:
        return None
    module.mean, module.std = mean, max(std, 1e-6)
    metrics = {"steps": total, "score_mean": mean, "score_std": std}
    report = evaluation(margins, train, heldout)
    if report:
        context.log(
            f"held-out accuracy {report['accuracy']:.3f} "
            f"[{report['low']:.3f}, {report['high']:.3f}] on {report['n']} pairs; baselines: "
            + ", ".join(f"{k} {v['accuracy']:.3f}" for k, v in report["baselines"].items())
        )
    folder = context.scratch("result")
    save_scalar_model(export(module, weights), folder, source)  # type: ignore[arg-type]
    artifact = context.publish(job, folder, {"metrics": {**metrics, "heldout": report}})
    checkpointer.finish()
    return artifact


METRICS = ("accuracy", "margin")


def in_one_row(job: RewardJob, module: ScalarModel, rows: Sequence[dict[str, Any]]) -> bool:
    """Whether the pairs of a batch share rows, so that their prompts are computed once."""
    if max(shared_length(r) for r in rows) > LONGEST or not all(r["prompt_ids"] for r in rows):
        return False
    return job.resources.strategy != "gemini" and takes_block_masks(module.backbone)


def sft_replies(
    job: RewardJob, context: StageContext, strategy: Strategy, source: Path, train: Rows
) -> list[list[int]]:
    """Prompt + SFT reply of some training prompts, as token ids.

    Pairs that were sampled from this very model are such replies already; else they are sampled.
    """
    count = min(job.normalization_prompts, len(train))
    rows = train.take(list(range(count)))
    sampled = context.store.get(job.data).metadata.get("sampled_from") == job.model
    if sampled:
        return [[*r["prompt_ids"], *r[k]] for r in rows for k in ("chosen_ids", "rejected_ids")]
    model = load_causal_lm(source).to(strategy.device)
    tokenizer = load_tokenizer(source, is_trusted(source))
    group = strategy.group
    mine = list(range(count))[group.rank :: group.size]
    with strategy.autocast():
        rollout = generate(
            model,
            [rows[i]["prompt_ids"] for i in mine],
            max_new_tokens=job.max_new_tokens,
            eos_ids=stop_tokens(source),
            pad_id=tokenizer.pad_token_id or 0,
            row_seeds=make_row_seeds(job.seed, 0, mine),
        )
    replies = [rollout.response_ids[i][rollout.response_mask[i]].tolist() for i in range(len(mine))]
    whole = group.interleave(replies)
    return [[*row["prompt_ids"], *reply] for row, reply in zip(rows, whole, strict=True)]


@torch.no_grad()
def probe_head(
    module: ScalarModel, train: Rows, strategy: Strategy, micro: int, context: StageContext
) -> None:
    """Start the head as a linear probe on the untrained model, computed by all ranks together."""
    group = strategy.group
    module.to(group.device)
    rows = train.take(list(range(len(train))))
    found: list[tuple[int, Tensor]] = []
    for positions in split_batch([pair_length(r) for r in rows], group.rank, group.size, 2 * micro):
        input_ids, mask = collate_pairs([rows[p] for p in positions], group.device)
        with strategy.autocast():
            states = module.states(input_ids, mask).float()  # (2b,S,d)
        last = last_real(mask)
        pooled = states[torch.arange(len(last), device=group.device), last].cpu()  # (2b,d)
        chosen, rejected = pooled.chunk(2)
        found += [
            (p, torch.stack(pair)) for p, *pair in zip(positions, chosen, rejected, strict=True)
        ]
    pairs = torch.stack(group.in_order(found))  # (n,2,d)
    with torch.enable_grad():
        weight, l2, accuracy = fit_probe(pairs[:, 0], pairs[:, 1], [r["prompt"] for r in rows])
    module.head.weight.copy_(weight.unsqueeze(0))
    module.head.bias.zero_()
    context.log(f"probe on {len(rows)} pairs: cross-validated accuracy {accuracy:.3f} (l2 {l2:g})")


def score_all(
    module: ScalarModel, sequences: Sequence[Sequence[int]], strategy: Strategy, micro: int
) -> Tensor:
    """Scores (n,) fp64 of sequences, in their order, computed by all ranks together."""
    with strategy.autocast():
        scores = score_sequences(module, sequences, strategy.group, micro)
    return torch.tensor(scores, dtype=torch.float64)


def heldout_margins(module: ScalarModel, rows: Rows, strategy: Strategy, micro: int) -> list[float]:
    """chosen - rejected score of every held-out pair."""
    items = rows.take(list(range(len(rows))))
    chosen = [[*r["prompt_ids"], *r["chosen_ids"]] for r in items]
    rejected = [[*r["prompt_ids"], *r["rejected_ids"]] for r in items]
    scores = score_all(module, chosen + rejected, strategy, micro)
    return (scores[: len(items)] - scores[len(items) :]).tolist()


def evaluation(margins: list[float], train: Rows, heldout: Rows) -> dict[str, Any]:
    """Held-out accuracy with its interval, beside the baselines'; empty without held-out pairs."""
    if not margins:
        return {}
    known, unknown = (
        [(r["chosen"], r["rejected"]) for r in rows.take(list(range(len(rows))))]
        for rows in (train, heldout)
    )
    return {
        **accuracy(margins),
        "baselines": {
            "length": accuracy(baselines.length_margins(known, unknown)),
            "bag_of_words": accuracy(baselines.bag_of_words_margins(known, unknown)),
        },
    }
