"""Building blocks of losses: shape checks, sums and means under a mask, and their denominators.

Conventions: `rlhf_core.losses`.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Metrics = dict[str, Tensor]
Denominator = float | Tensor | None
Average = Literal[
    "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
]


def upcast(x: Tensor) -> Tensor:
    """x in fp32, or unchanged where it is fp64 already."""
    return x if x.dtype == torch.float64 else x.float()


def check_same_shape(**tensors: Tensor) -> None:
    """Refuse tensors that would broadcast against each other: that is always a bug here.

    Raises:
        ValueError: shapes differ, or ``mask`` is not bool.
    """
    if len({t.shape for t in tensors.values()}) > 1:
        found = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
        raise ValueError(f"these must have one shape, found {found}")
    mask = tensors.get("mask")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool (True = real token), found {mask.dtype}")


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x (B,T) over the True positions of mask (B,T), a scalar."""
    return torch.where(mask, x, torch.zeros_like(x)).sum()


def masked_mean(x: Tensor, mask: Tensor, denominator: Denominator = None) -> Tensor:
    """Sum of x (B,T) over mask (B,T), divided by the denominator (None: the number of True).

    Raises:
        ValueError: no denominator was given and no position of the mask is True.
    """
    check_same_shape(x=x, mask=mask)
    return masked_sum(x, mask) / token_count(mask, denominator)


def token_count(mask: Tensor, denominator: Denominator) -> float | Tensor:
    """The denominator of a mean over tokens; None: the number of True in the mask.

    Raises:
        ValueError: no denominator was given and no position of the mask is True.
    """
    if denominator is not None:
        return denominator
    count = mask.sum()
    if count == 0:
        raise ValueError(
            f"the mask {tuple(mask.shape)} holds no real token, at least one is needed; "
            "pass the global batch's count as denominator if this micro-batch may be empty"
        )
    return count


def row_count(x: Tensor, denominator: Denominator) -> float | Tensor:
    """The denominator of a mean over rows; None: the rows of x (B, ...).

    Raises:
        ValueError: no denominator was given and x has no rows.
    """
    if denominator is not None:
        return denominator
    if x.shape[0] == 0:
        raise ValueError("found a batch of 0 rows, at least one is needed")
    return float(x.shape[0])


def averaging_weights(
    mask: Tensor, average: Average, *, replies: float, tokens: float, horizon: int | None = None
) -> Tensor:
    """What a token's loss is multiplied by, so that the sum over all tokens is the average.

    ``token-mean``: the mean over all tokens (DAPO, arXiv 2503.14476).
    ``seq-mean-token-mean``: over each reply's tokens, then over replies (GRPO, arXiv 2402.03300).
    ``seq-mean-token-sum``: the sum of each reply's tokens, then the mean over replies.
    ``seq-mean-token-sum-norm``: that over a constant, ``horizon`` (Dr. GRPO, arXiv 2503.20783).

    Args:
        mask: (B,T) bool. replies, tokens: of the global batch.
        horizon: tokens, for ``seq-mean-token-sum-norm``.

    Returns:
        (B,1).

    Raises:
        ValueError: an unknown average, or no horizon for the one that needs it.
    """
    if average == "seq-mean-token-mean":
        return 1.0 / mask.sum(dim=1, keepdim=True).clamp(min=1).float() / replies
    if average == "seq-mean-token-sum-norm":
        if horizon is None:
            raise ValueError("seq-mean-token-sum-norm needs a horizon, found none")
        weight = 1.0 / (replies * horizon)
    elif average in ("token-mean", "seq-mean-token-sum"):
        weight = 1.0 / (tokens if average == "token-mean" else replies)
    else:
        raise ValueError(f"found average {average!r}, needed one of {', '.join(get_args(Average))}")
    return torch.full((mask.shape[0], 1), weight, device=mask.device)


def sequence_logps(logprobs: Tensor, mask: Tensor, *, mean: bool = False) -> Tensor:
    """Log-probability of each whole response: the sum, or mean, of its tokens' (nats).

    Args:
        logprobs: (B,T). mask: (B,T) bool.
        mean: divide by each row's number of real tokens (SimPO, ORPO).

    Returns:
        (B,).

    Raises:
        ValueError: with ``mean``, a row has no real token (the row is named).
    """
    check_same_shape(logprobs=logprobs, mask=mask)
    logprobs = upcast(logprobs)
    total = torch.where(mask, logprobs, torch.zeros_like(logprobs)).sum(dim=1)  # (B,)
    if not mean:
        return total
    lengths = mask.sum(dim=1)  # (B,)
    if bool((lengths == 0).any()):
        row = int((lengths == 0).nonzero()[0])
        raise ValueError(f"row {row} has no real token, at least one is needed for its mean")
    return total / lengths


def pair_metrics(margin: Tensor, count: float | Tensor) -> Metrics:
    """Accuracy (a tie counts half) and mean of the margins (B,)."""
    margin = margin.detach()
    accuracy = ((margin > 0).float() + 0.5 * (margin == 0).float()).sum() / count
    return {"accuracy": accuracy, "margin": margin.sum() / count}
