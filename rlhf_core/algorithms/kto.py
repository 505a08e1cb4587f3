"""Kahneman-Tversky optimisation (KTO, arXiv 2402.01306): single replies marked good or bad.

How far a reply's log-ratio is above or below z decides how much it counts. z is the KL between
policy and reference, estimated as in the paper (section 4.1) from replies to other prompts: each
prompt of the global batch with the reply of the next row. The next row with *another* prompt, that
is: halves of one pair, or several replies to a prompt, would else be taken for strangers.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.errors import DataError, NonFinite
from rlhf_core.jobs import KTOJob
from rlhf_core.losses.preference import kto_loss
from rlhf_core.losses.reductions import Metrics, sequence_logps
from rlhf_core.models.loading import load_causal_lm
from rlhf_core.nn.modules import Policy
from rlhf_core.runtime.context import StageContext
from rlhf_core.store import Artifact
from rlhf_core.training.batching import batch_rows, learning_rate_scale, split_batch, steps_in
from rlhf_core.training.checkpoint import Checkpointer
from rlhf_core.training.nonfinite import failure
from rlhf_core.training.policy import prepare_policy
from rlhf_core.training.preference import (
    PAIR_METRICS,
    Reply,
    collate_replies,
    heldout_metrics,
    pair_response_lengths,
    publish_results,
    response_logps,
)
from rlhf_core.training.strategy import Strategy

Ask = tuple[int, int]  # row whose prompt, row whose response
Logps = dict[Ask, float]  # nats


def run(job: KTOJob, context: StageContext) -> Artifact | None:
    """Train, evaluate on held-out rows, publish. Every rank calls; rank 0 returns the artifact."""
    resources = job.resources
    strategy = Strategy(resources, job.precision, job.max_grad_norm)
    source = context.store.fetch(job.model)
    data = context.store.fetch(job.data)
    train, heldout = (
        LabelledReplies(Rows(data, split, purpose=("unpaired", "preference")))
        for split in ("train", "heldout")
    )
    total = steps_in(len(train), job.batch_size, job.epochs, job.max_steps)
    asked = look_ahead(train, job, total)

    module = prepare_policy(job, load_causal_lm(source), strategy)
    # The reference is this very model, asked once before its weights change.
    began = time.perf_counter()
    reference = reply_logps(module, train, asked, strategy, job)
    heldout_rows, everything = heldout.take(range(len(heldout))), range(len(heldout))
    heldout_asked = [
        *zip(everything, everything, strict=True),
        *strangers(heldout_rows, everything),
    ]
    heldout_reference = reply_logps(module, heldout, heldout_asked, strategy, job)
    context.log(
        f"reference log-probabilities of {len(reference) + len(heldout_reference)} replies in "
        f"{time.perf_counter() - began:.1f} s"
    )
    checkpointer = Checkpointer(context, strategy, job)
    start, _ = checkpointer.restore()

    for step in range(start, total):
        began = time.perf_counter()
        # 1. The global batch.
        numbers = batch_rows(len(train), job.batch_size, step, job.seed)
        rows = train.take(numbers)
        scale = learning_rate_scale(step, total, job.warmup_fraction, job.schedule)
        scale *= checkpointer.rate
        strategy.set_learning_rate(scale)
        # 2. The KL to the reference, from replies to other prompts; without a gradient.
        others = strangers(rows, numbers)
        kl = mean_log_ratio(reply_logps(module, train, others, strategy, job), reference, others)
        # 3. Forward and backward over this rank's micro-batches.
        micro = split_batch(
            [len(r["prompt_ids"]) + len(r["completion_ids"]) for r in rows],
            strategy.rank, strategy.world_size, resources.micro_batch_size, strategy.padding,
        )  # fmt: skip
        sums = torch.zeros(1 + len(PAIR_METRICS), dtype=torch.float64)
        try:
            for i, positions in enumerate(micro):
                mine = [rows[p] for p in positions]
                batch = collate_replies([as_reply(r, r) for r in mine], strategy.device)
                ref = torch.tensor([reference[numbers[p], numbers[p]] for p in positions])
                with strategy.micro_batch(last=i == len(micro) - 1):
                    logps = sequence_logps(strategy.module(*batch), batch[2])  # (b,)
                    loss, metrics = reply_loss(job, logps, ref, mine, kl, len(rows))
                    strategy.backward(loss)
                sums += torch.tensor([loss.item(), *(float(metrics[k]) for k in PAIR_METRICS)])
            # 4. Update.
            grad_norm = strategy.step()
        except NonFinite as error:
            raise failure(error, checkpointer, step + 1, rows, positions) from error
        # 5. Report and save.
        found = strategy.group.sum(sums).tolist()
        seconds = time.perf_counter() - began
        tokens = sum(len(r["prompt_ids"]) + len(r["completion_ids"]) for r in rows)
        context.log_metrics(
            step + 1, total,
            {
                **reported(found, rows),
                "kl": kl,
                "learning_rate": job.learning_rate * scale,
                "grad_norm": grad_norm,
                "tokens_per_second": tokens / seconds,
            },
        )  # fmt: skip
        checkpointer.after_step(step + 1, total)

    results: dict[str, float] = {"steps": total}
    if heldout_rows:
        now = reply_logps(module, heldout, heldout_asked, strategy, job)
        kl = mean_log_ratio(now, heldout_reference, heldout_asked[len(heldout) :])
        logps, ref = (
            torch.tensor([said[i, i] for i in everything], dtype=torch.float64)
            for said in (now, heldout_reference)
        )
        judged = reply_loss(job, logps, ref, heldout_rows, kl, len(heldout))
        results |= heldout_metrics(judged) | {"heldout_kl": kl}
    return publish_results(job, context, strategy, checkpointer, module, source, results)


# --------------------------------------------------------------------------------------- data


class LabelledReplies:
    """Replies that are good or bad: unpaired rows, or pairs taken apart into two rows each."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.paired = rows, rows.purpose == "preference"

    def __len__(self) -> int:
        return len(self.rows) * (2 if self.paired else 1)

    def take(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Rows with prompt_ids, completion_ids and label; a pair's chosen reply comes first."""
        if not self.paired:
            return self.rows.take(numbers)
        pairs = self.rows.take([number // 2 for number in numbers])
        keys = ("chosen_ids", "rejected_ids")
        return [
            {"prompt_ids": pair["prompt_ids"], "completion_ids": pair[keys[number % 2]],
             "label": number % 2 == 0, "row": pair["row"]}
            for pair, number in zip(pairs, numbers, strict=True)
        ]  # fmt: skip

    @cached_property
    def lengths(self) -> tuple[list[int], list[int]]:
        """Tokens of each row's prompt and of its response."""
        prompts = torch.from_numpy(self.rows.lengths("prompt_ids"))
        if not self.paired:
            return prompts.tolist(), self.rows.lengths("completion_ids").tolist()
        responses = pair_response_lengths(self.rows)  # (n,2)
        return prompts.repeat_interleave(2).tolist(), responses.flatten().tolist()


def as_reply(prompt: Mapping[str, Any], response: Mapping[str, Any]) -> Reply:
    """One row's prompt with another's response, or with its own."""
    return prompt["prompt_ids"], response["completion_ids"]


def strangers(rows: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> list[Ask]:
    """Each row's prompt with the response of the next row, going round, that has another prompt;
    with the next one's where all have the same."""
    count = len(rows)
    found = []
    for i, row in enumerate(rows):
        after = [(i + k) % count for k in range(1, count)] or [i]
        other = (j for j in after if rows[j]["prompt_ids"] != row["prompt_ids"])
        found.append((numbers[i], numbers[next(other, after[0])]))
    return found


def look_ahead(train: LabelledReplies, job: KTOJob, total: int) -> list[Ask]:
    """All that `total` steps will ask a model about, each once, in order.

    Raises:
        DataError: all replies are good, or all are bad.
    """
    asked: set[Ask] = set()
    labels: Counter[bool] = Counter()
    for step in range(total):
        numbers = batch_rows(len(train), job.batch_size, step, job.seed)
        rows = train.take(numbers)
        asked |= {*zip(numbers, numbers, strict=True), *strangers(rows, numbers)}
        labels.update(row["label"] for row in rows)
    if len(labels) == 1:
        found, missing = ("good", "bad") if True in labels else ("bad", "good")
        raise DataError(
            f"All {labels.total():,} training replies are {found} (label {found == 'good'}), and "
            f"KTO learns from what tells them from {missing} ones: add {missing} replies, or use "
            "sft for good replies alone."
        )
    return sorted(asked)


# ----------------------------------------------------------------------------- what is learned


def reply_logps(
    module: Policy, replies: LabelledReplies, asked: Sequence[Ask], strategy: Strategy, job: KTOJob
) -> Logps:
    """Log-probability of each response asked for, after its prompt, by all ranks together."""
    prompts, responses = replies.lengths
    lengths = [prompts[p] + responses[r] for p, r in asked]

    def load(indices: list[int]) -> list[Reply]:
        before = replies.take([asked[index][0] for index in indices])
        after = replies.take([asked[index][1] for index in indices])
        return [as_reply(p, r) for p, r in zip(before, after, strict=True)]

    logps = response_logps(module, lengths, load, strategy, job.resources.micro_batch_size)
    return dict(zip(asked, logps.tolist(), strict=True))


def mean_log_ratio(now: Logps, reference: Logps, asked: Sequence[Ask]) -> float:
    """The estimate of KL(policy || reference) in nats; one below 0 counts as 0 in the loss."""
    return sum(now[ask] - reference[ask] for ask in asked) / len(asked)


def reply_loss(
    job: KTOJob,
    logps: Tensor,
    ref: Tensor,
    rows: Sequence[Mapping[str, Any]],
    kl: float,
    count: int,
) -> tuple[Tensor, Metrics]:
    """KTO's loss of some rows, and with its metrics the sums of both kinds' implicit rewards.

    Args:
        logps, ref: (b,) log-probabilities of the responses, of policy and reference.
        count: rows of the global batch.
    """
    label = torch.tensor([bool(row["label"]) for row in rows], device=logps.device)  # (b,)
    ref = ref.to(logps.device)
    loss, metrics = kto_loss(
        logps, ref, label, kl, job.beta, job.desirable_weight, job.undesirable_weight,
        denominator=float(count),
    )  # fmt: skip
    rewards = job.beta * (logps.detach() - ref)  # (b,)
    metrics["chosen_reward"] = rewards[label].sum()
    metrics["rejected_reward"] = rewards[~label].sum()
    return loss, metrics


def reported(found: Sequence[float], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Loss and PAIR_METRICS of the global batch; the rewards are means over the rows of their
    kind, and one is left out where there is none."""
    metrics = dict(zip(("loss", *PAIR_METRICS), found, strict=True))
    good = sum(bool(row["label"]) for row in rows)
    for name, number in (("chosen_reward", good), ("rejected_reward", len(rows) - good)):
        total = metrics.pop(name)
        if number:
            metrics[name] = total / number
    return metrics
