"""Updates on a rollout. Each algorithm has its own loss: a function from a `MicroBatch`.

B replies of a rollout (global), b rows of a micro-batch, S positions, T response positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from torch import Tensor

from rlhf_core.errors import NonFinite, TrainingFailure
from rlhf_core.losses.correction import weighted
from rlhf_core.losses.supervised import sft_loss
from rlhf_core.nn.padding import Batch, flat_indices, put, take, to_device
from rlhf_core.training.nonfinite import failure
from rlhf_core.training.online.batches import (
    Update,
    collate_responses,
    micro_batches,
    split_minibatches,
    update_order,
)
from rlhf_core.training.online.correction import correction_weights
from rlhf_core.training.online.experience import Experience, Targets, assert_same_policy
from rlhf_core.training.online.first_pass import FirstPass
from rlhf_core.training.online.ptx import PtxBatch, ptx_batches
from rlhf_core.training.online.report import inspect
from rlhf_core.training.online.stage import OnlineStage
from rlhf_core.training.reading import detached, read_all
from rlhf_core.training.schedule import set_learning_rate
from rlhf_core.training.strategy import Strategy
from rlhf_core.training.updates import add_up


@dataclass(frozen=True)
class MicroBatch:
    """What a loss sees of b replies; only `logprobs` and `values` have a gradient."""

    logprobs: Tensor  # (b,T) of the policy as it is now
    old_logprobs: Tensor  # (b,T) of the policy before the rollout's updates
    ref_logprobs: Tensor | None  # (b,T); None: there is no reference
    response_mask: Tensor  # (b,T) bool, tokens that the policy sampled
    advantages: Tensor  # (b,T) or (b,)
    values: Tensor | None  # (b,T) of PPO's critic as it is now
    old_values: Tensor | None  # (b,T)
    returns: Tensor | None  # (b,T)
    replies: float  # of the minibatch over all ranks with a token in the loss, divides sums
    tokens: float  # the same of its tokens in the loss
    loss_mask: Tensor  # (b,T) bool, tokens that are trained on, a part of response_mask
    weights: Tensor | None = None  # (b,T) or (b,) of the rollout correction, None: all are 1

    @property
    def weighted_advantages(self) -> Tensor:
        """Advantages times the weights of the rollout correction, (b,T) or (b,): a weight is a
        factor of the surrogate as well. Every surrogate of a policy takes these."""
        return weighted(self.advantages, self.weights)


Loss = Callable[[MicroBatch], tuple[Tensor, Mapping[str, float | Tensor]]]
"""The micro-batch's share of the loss, and of metrics that sum over micro-batches and ranks;
approx_kl must be one of them."""


def optimise(
    stage: OnlineStage,
    step: int,
    experience: Experience,
    targets: Targets,
    first_pass: FirstPass,
    epochs: int,
    loss: Loss,
) -> tuple[Experience, dict[str, float]]:
    """Epochs over the rollout, one optimizer step for each minibatch.

    Returns:
        The experience, with the old log-probabilities that scoring left to the first update; and
        means over all updates of the loss's metrics, ptx_loss, learning_rate and those of
        `Strategy.step_metrics`.

    Raises:
        NonFinite: a loss or gradient is NaN or infinite; the batch is saved.
        Preempted: the job was told to stop.
        TrainingFailure: the first update sees other log-probabilities than scoring or sampling.
    """
    job, strategy, checkpointer = stage.job, stage.strategy, stage.checkpointer
    checkpointer.stop_if_asked(step)
    learning_rate = set_learning_rate(job, strategy, checkpointer, step, job.steps)
    minibatches = split_minibatches(job.replies, job.minibatches)
    history: list[dict[str, float]] = []
    try:
        for update in update_order(job.seed, step, epochs, job.minibatches):
            shares, gap = accumulate_gradients(
                stage, experience, targets, first_pass, minibatches[update.minibatch], update, loss
            )
            if first_pass.unfinished:
                old_logprobs = first_pass.complete(experience.old_logprobs, strategy.group)
                experience = replace(experience, old_logprobs=old_logprobs)
                assert_same_policy(job, experience, strategy.precision)
            elif update.epoch == update.minibatch == 0:
                assert_ratio_is_one(strategy, gap)
            strategy.step()
            history.append(add_up(shares, strategy.group) | strategy.step_metrics())
    except NonFinite as error:
        raise failure(error, checkpointer, step + 1, *inspect(experience, targets)) from error
    metrics = mean_over_updates(history, mixed_in=stage.inputs.ptx is not None)
    return experience, metrics | {"learning_rate": learning_rate}


def accumulate_gradients(
    stage: OnlineStage,
    experience: Experience,
    targets: Targets,
    first_pass: FirstPass,
    minibatch: list[int],
    update: Update,
    loss: Loss,
) -> tuple[list[dict[str, float]], float]:
    """Forward and backward over this rank's micro-batches of a minibatch.

    Args:
        minibatch: indices of its replies.

    Returns:
        Each micro-batch's shares of the metrics, and the largest |log-ratio| of a token.
    """
    job, strategy = stage.job, stage.strategy
    micro = micro_batches(job, strategy, experience.rollout.sequences, [minibatch])
    mixed_in = ptx_batches(
        job, strategy, stage.inputs.ptx,
        replies=len(minibatch), update=update.number, micro_batches=len(micro),
    )  # fmt: skip
    trained = experience.loss_mask[minibatch].sum(dim=1)  # (minibatch,)
    # At least 1: of a minibatch whose replies are all left out, all sums are 0.
    replies, tokens = (max(1.0, float(n.sum())) for n in (trained > 0, trained))
    found = []
    for i, (indices, ptx) in enumerate(zip(micro, mixed_in, strict=True)):
        with strategy.micro_batch(last=i == len(micro) - 1):
            micro_batch, ptx_logprobs = forward_micro_batch(
                stage, experience, targets, first_pass, indices, replies, tokens, ptx
            )
            total, metrics = loss(micro_batch)
            ptx_loss: float | Tensor = 0.0
            if ptx is not None:
                assert ptx_logprobs is not None
                ptx_loss, _ = sft_loss(ptx_logprobs, ptx.batch.loss_mask, denominator=ptx.tokens)
                total = total + job.ptx_coef * ptx_loss
            strategy.backward(total)
        gap = log_ratio_gap(micro_batch)
        found.append(detached({**metrics, "ptx_loss": ptx_loss, "gap": gap}))
    shares = read_all(found)
    return shares, max(share.pop("gap") for share in shares)


def forward_micro_batch(
    stage: OnlineStage,
    experience: Experience,
    targets: Targets,
    first_pass: FirstPass,
    indices: list[int],
    replies: float,
    tokens: float,
    ptx: PtxBatch | None,
) -> tuple[MicroBatch, Tensor | None]:
    """Forward pass of the trained module over some replies.

    Args:
        indices: of the replies. replies, tokens: of the minibatch, which are in the loss.

    Returns:
        What the loss sees, and the log-probabilities of the rows that are mixed in.
    """
    strategy, rollout = stage.strategy, experience.rollout
    assert strategy.module is not None
    batch = collate_responses(
        rollout.sequences, rollout.prompt_lengths, indices, strategy.device, rollout.trained
    )
    with first_pass.shared_layers(indices, batch.input_ids, batch.mask, batch.index):
        flat_logprobs, flat_values, ptx_logprobs = strategy.module(
            *batch, stage.job.temperature, None if ptx is None else ptx.batch
        )  # (b,S) each

    def part(whole: Tensor) -> Tensor:
        return to_device(whole[indices], strategy.device)

    response_mask = experience.response_mask[indices]  # (b,T)
    at = to_device(flat_indices(response_mask), strategy.device)  # (N,)
    align = partial(to_response, batch, at, response_mask.shape)
    logprobs = align(flat_logprobs)  # (b,T)
    if first_pass.defers(indices):
        first_pass.record(indices, logprobs)
        old_logprobs = logprobs.detach()
    else:
        old_logprobs = part(experience.old_logprobs)
    loss_mask = part(experience.loss_mask)
    micro_batch = MicroBatch(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        ref_logprobs=None if experience.ref_logprobs is None else part(experience.ref_logprobs),
        response_mask=to_device(response_mask, strategy.device),
        advantages=part(targets.advantages),
        values=None if flat_values is None else align(flat_values),
        old_values=None if experience.values is None else part(experience.values),
        returns=None if targets.returns is None else part(targets.returns),
        replies=replies,
        tokens=tokens,
        loss_mask=loss_mask,
        weights=correction_weights(
            stage.job, old_logprobs, part(experience.rollout_logprobs), loss_mask
        ),
    )
    return micro_batch, ptx_logprobs


def to_response(batch: Batch, at: Tensor, shape: tuple[int, int], flat: Tensor) -> Tensor:
    """(b,S) at the batch's loss mask -> fp32 (b,T) at the response mask, with its gradient.

    Args:
        at: (N,) of the response mask, see `flat_indices`. shape: b and T.
    """
    assert batch.index.loss is not None
    return put(take(flat.float(), batch.index.loss), at, *shape)


def log_ratio_gap(micro_batch: MicroBatch) -> Tensor:
    """Largest |log-ratio| of a real token."""
    gap = micro_batch.logprobs.detach() - micro_batch.old_logprobs  # (b,T)
    return (gap.abs() * micro_batch.response_mask).max()


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


def mean_over_updates(history: Sequence[dict[str, float]], *, mixed_in: bool) -> dict[str, float]:
    """Means over a rollout's updates; approx_kl is the last one's, which is the farthest."""
    mean = {k: float(np.mean([h[k] for h in history])) for k in history[0]}
    mean["approx_kl"] = history[-1]["approx_kl"]
    if not mixed_in:
        del mean["ptx_loss"]
    return mean
