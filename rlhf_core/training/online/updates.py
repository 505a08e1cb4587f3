"""Updates on a rollout: passes over it, minibatches and micro-batches. What is minimised is each
algorithm's own: a function from a `MicroBatch` to a loss.

b rows of a micro-batch, S positions, T response positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.errors import TrainingFailure
from rlhf_core.jobs import OnlineJob
from rlhf_core.losses.supervised import sft_loss
from rlhf_core.nn.padding import Batch
from rlhf_core.system.seeds import derive_seed
from rlhf_core.training.batching import batch_rows, split_evenly
from rlhf_core.training.language_modelling import collate, trained_tokens
from rlhf_core.training.online.batches import collate_responses, micro_batches
from rlhf_core.training.online.experience import Experience, add_late
from rlhf_core.training.strategy import Strategy


@dataclass
class MicroBatch:
    """What a loss sees of a micro-batch.

    Attributes:
        logprobs: (b,T) of the policy as it is now, with their gradient.
        values: (b,T) of PPO's critic likewise, else None.
        mask: (b,T) bool.
        replies, tokens: of the minibatch over all ranks: what sums are divided by.
    """

    experience: Experience
    positions: list[int]
    logprobs: Tensor
    values: Tensor | None
    mask: Tensor
    replies: float
    tokens: float

    def of(self, whole: Tensor | None) -> Tensor:
        """These rows of one of the experience's tensors."""
        assert whole is not None
        return whole[self.positions].to(self.mask.device)


Loss = Callable[[MicroBatch], tuple[Tensor, Mapping[str, float | Tensor]]]
"""The part's share of the loss, and of metrics that sum over micro-batches and ranks; approx_kl
must be one of them."""


def optimise(
    job: OnlineJob,
    strategy: Strategy,
    experience: Experience,
    minibatches: list[list[int]],
    ptx: Rows | None,
    step: int,
    epochs: int,
    loss_of: Loss,
) -> dict[str, float]:
    """Passes over the rollout, one optimizer step per minibatch. Finds what `score` left to the
    first of them.

    Returns:
        Means over all updates of the loss's metrics, ptx_loss and the gradient norm.
    """
    history: list[dict[str, float]] = []
    for epoch, index, number in passes(job.seed, step, epochs, job.minibatches):
        rows = minibatches[index]
        tokens = float(experience.mask[rows].sum())
        micro = micro_batches(job, strategy, experience.sequences, [rows])
        extra = ptx_batches(job, strategy, ptx, len(rows), number, len(micro))
        sums: dict[str, float] = {}
        gap = 0.0
        for i, positions in enumerate(micro):
            batch = collate_responses(
                experience.sequences, experience.prompt_lengths, positions, strategy.device
            )
            with strategy.micro_batch(last=i == len(micro) - 1):
                part, ptx_logprobs = forward_micro_batch(
                    job, strategy, experience, positions, batch, len(rows), tokens, extra[i]
                )
                if experience.late:
                    experience.old_logprobs[positions] = part.logprobs.detach().cpu()
                loss, metrics = loss_of(part)
                shares = {name: float(value) for name, value in metrics.items()}
                shares["ptx_loss"] = 0.0
                if extra[i] is not None:
                    mixed_in, count = extra[i]
                    ptx_term, _ = sft_loss(ptx_logprobs, mixed_in[2], denominator=count)
                    loss = loss + job.ptx_coef * ptx_term
                    shares["ptx_loss"] = ptx_term.item()
                strategy.backward(loss)
            sums = {name: sums.get(name, 0.0) + share for name, share in shares.items()}
            gap = max(gap, log_ratio_gap(part))
        if experience.late:
            add_late(job, strategy.group, experience, micro)
        elif epoch == 0 and index == 0:
            assert_ratio_is_one(strategy, gap)
        grad_norm = strategy.step()
        totals = strategy.group.sum(torch.tensor([*sums.values()], dtype=torch.float64)).tolist()
        history.append(dict(zip(sums, totals, strict=True)) | {"grad_norm": grad_norm})
    return mean_over_updates(history, ptx is not None)


def forward_micro_batch(
    job: OnlineJob,
    strategy: Strategy,
    experience: Experience,
    positions: list[int],
    batch: Batch,
    replies: int,
    tokens: float,
    extra: tuple[Batch, float] | None,
) -> tuple[MicroBatch, Tensor | None]:
    """The forward pass of a micro-batch, and the log-probabilities of what is mixed in."""
    assert strategy.module is not None
    with experience.states.of(positions, batch[0], batch[1]):
        logprobs, values, mixed_in = strategy.module(
            *batch, job.temperature, None if extra is None else extra[0]
        )
    mask = experience.mask[positions].to(strategy.device)  # (b,T)
    seen = [None if x is None else aligned(x, batch[2], mask) for x in (logprobs, values)]
    assert seen[0] is not None
    part = MicroBatch(experience, positions, seen[0], seen[1], mask, float(replies), tokens)
    return part, mixed_in


def passes(seed: int, step: int, epochs: int, minibatches: int) -> Iterator[tuple[int, int, int]]:
    """The updates of a rollout: the first pass in order, later ones shuffled.

    Yields:
        Epoch and minibatch, and the number of the update since the stage began.
    """
    for epoch in range(epochs):
        order = range(minibatches)
        if epoch > 0:
            generator = np.random.default_rng(derive_seed(seed, step, epoch))
            order = generator.permutation(minibatches).tolist()
        for index in order:
            yield epoch, index, (step * epochs + epoch) * minibatches + index


def ptx_batches(
    job: OnlineJob, strategy: Strategy, ptx: Rows | None, count: int, number: int, micro: int
) -> list[tuple[Batch, float] | None]:
    """As many language-modelling rows as the minibatch has replies, in as many
    parts, with their count.

    Args:
        count: rows. number: of the update, see `passes`. micro: micro-batches of this rank.
    """
    if ptx is None:
        return [None] * micro
    rows = ptx.take(batch_rows(len(ptx), count, number, derive_seed(job.seed, 0x907)))
    tokens = float(sum(trained_tokens(r) for r in rows))
    lengths = [len(r["input_ids"]) for r in rows]
    parts = split_evenly(lengths, strategy.rank, strategy.world_size, micro)
    return [(collate([rows[p] for p in part], strategy.device), tokens) for part in parts]


def aligned(flat: Tensor, loss_mask: Tensor, mask: Tensor) -> Tensor:
    """(b,S) at the loss mask -> fp32 (b,T) at the mask's, with its gradient."""
    zeros = torch.zeros(mask.shape, device=flat.device)
    return zeros.masked_scatter(mask, flat.float()[loss_mask])


def log_ratio_gap(part: MicroBatch) -> float:
    """Largest |log-ratio| of a real token."""
    gap = part.logprobs.detach() - part.of(part.experience.old_logprobs)
    return float((gap.abs() * part.mask).max())


def assert_ratio_is_one(strategy: Strategy, gap: float) -> None:
    """Before the first update of a rollout, training must see the log-probabilities it scored.

    Raises:
        TrainingFailure: a log-ratio is off by more than rounding.
    """
    bound = 1e-3 if strategy.precision == "fp32" else 0.05
    if gap > bound:
        raise TrainingFailure(
            f"Before the first update the log-probability of a token differs by {gap:.4f} between "
            f"scoring and training (bound {bound}): the model is not deterministic. Switch off "
            "dropout and custom kernels, or use precision fp32."
        )


def mean_over_updates(history: Sequence[dict[str, float]], ptx: bool) -> dict[str, float]:
    """Means over a rollout's updates; approx_kl is the last one's, which is the farthest."""
    mean = {k: float(np.mean([h[k] for h in history])) for k in history[0]}
    mean["approx_kl"] = history[-1]["approx_kl"]
    if not ptx:
        del mean["ptx_loss"]
    return mean
