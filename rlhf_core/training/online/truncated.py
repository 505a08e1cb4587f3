"""Leaves replies that were cut at max_new_tokens out of the loss (overlong filtering, DAPO, arXiv
2503.14476, section 3.4).

Their rewards count all the same: they are part of a group's mean, and of the metrics.
B replies of a rollout (global), T response positions.
"""

from __future__ import annotations

from torch import Tensor

from rlhf_core.errors import TrainingFailure
from rlhf_core.jobs import OnlineJob
from rlhf_core.training.online.batches import split_minibatches


def trained_tokens(job: OnlineJob, response_mask: Tensor, finished: Tensor) -> Tensor:
    """The tokens that are trained on.

    Args:
        response_mask: (B,T) bool. finished: (B,) bool, ended with an end-of-turn token.

    Returns:
        (B,T) bool.
    """
    if not job.mask_truncated_completions:
        return response_mask
    return response_mask & finished.unsqueeze(1)


def assert_something_is_left(job: OnlineJob, loss_mask: Tensor) -> None:
    """A rollout must have tokens (two, to have a standard deviation) that are trained on.

    Raises:
        TrainingFailure: all of its replies were cut, or nearly.
    """
    if not job.mask_truncated_completions or int(loss_mask.sum()) > 1:
        return
    left = int(loss_mask.any(dim=1).sum())
    raise TrainingFailure(
        f"{len(loss_mask) - left} of the {len(loss_mask)} replies of a rollout were cut at "
        f"max_new_tokens {job.max_new_tokens}, and {job.algorithm}.mask_truncated_completions "
        "leaves them out of the loss, so that there is nothing to learn from. Raise "
        f"{job.algorithm}.max_new_tokens, train the SFT model on replies with an end of turn, or "
        f"clear mask_truncated_completions (missing_eos_penalty or the reward length_penalty then "
        "make replies end)."
    )


def masked_metrics(job: OnlineJob, loss_mask: Tensor) -> dict[str, float]:
    """Share of the replies that were left out, and of the minibatches in which all were: their
    updates follow from nothing but text that is mixed in and the optimizer's momentum. Nothing
    where no reply is left out on purpose.

    Args:
        loss_mask: (B,T) bool.
    """
    if not job.mask_truncated_completions:
        return {}
    left = loss_mask.any(dim=1)  # (B,)
    minibatches = split_minibatches(len(left), job.minibatches)
    return {
        "masked_replies": float((~left).float().mean()),
        "masked_minibatches": sum(not bool(left[m].any()) for m in minibatches) / len(minibatches),
    }
