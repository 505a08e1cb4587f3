"""Losses of preference optimisation without a reward model; conventions: `rlhf_core.losses`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_core.losses.reductions import (
    Denominator,
    Metrics,
    check_same_shape,
    pair_metrics,
    row_count,
    upcast,
)

# ORPO's odds p / (1 - p) have a pole at p = 1, which a low-precision mean log-prob of 0 reaches.
_LARGEST_LOGP = -1e-6


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    *,
    denominator: Denominator = None,
) -> tuple[Tensor, Metrics]:
    """Direct preference optimisation (arXiv 2305.18290, equation 7).

    -log sigmoid(m), m = beta ((c - ref c) - (r - ref r)), over whole-response log-probs (nats,
    sums). With label smoothing e it is (1 - e) (-log sigmoid(m)) + e (-log sigmoid(-m)): the
    likelihood when a share e of the labels is the wrong way round ("conservative DPO", Mitchell,
    "A note on DPO with noisy preferences"; the authors' code has the same term).

    Args:
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: (B,).
        label_smoothing: share of the labels assumed to be wrong, 0 to 0.5.
        denominator: pairs of the global batch.

    Returns:
        The loss, and ``accuracy``, ``margin``, ``chosen_reward``, ``rejected_reward`` (the
        implicit rewards, beta times the log-ratio).
    """
    chosen, rejected = _log_ratios(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    chosen, rejected = beta * chosen, beta * rejected  # (B,)
    count = row_count(chosen, denominator)
    metrics = _reward_metrics(chosen, rejected, count)
    margin = chosen - rejected  # (B,)
    per_pair = F.softplus(-margin)  # (B,)
    if label_smoothing:
        per_pair = (1 - label_smoothing) * per_pair + label_smoothing * F.softplus(margin)
    return per_pair.sum() / count, metrics


def ipo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
    *,
    denominator: Denominator = None,
) -> tuple[Tensor, Metrics]:
    """Identity preference optimisation (arXiv 2310.12036, equation 17).

    (h - 1 / (2 beta))^2, h = (c - ref c) - (r - ref r). The paper's h is of whole responses, so
    the log-probs are sums, as in the DPO authors' code; libraries that take means per token need
    another beta.

    Args:
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: (B,), sums in nats.
        beta: the paper's tau; the margin h that is aimed at is 1 / (2 beta) nats.
        denominator: pairs of the global batch.

    Returns:
        The loss, and the metrics of `dpo_loss`.
    """
    chosen, rejected = _log_ratios(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    count = row_count(chosen, denominator)
    metrics = _reward_metrics(beta * chosen, beta * rejected, count)
    return (chosen - rejected - 1 / (2 * beta)).square().sum() / count, metrics


def _log_ratios(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor
) -> tuple[Tensor, Tensor]:
    """log(policy / reference) of both responses of each pair, (B,) and (B,)."""
    check_same_shape(
        chosen_logps=chosen,
        rejected_logps=rejected,
        ref_chosen_logps=ref_chosen,
        ref_rejected_logps=ref_rejected,
    )
    return (
        upcast(chosen) - upcast(ref_chosen.detach()),
        upcast(rejected) - upcast(ref_rejected.detach()),
    )


def _reward_metrics(chosen: Tensor, rejected: Tensor, count: float | Tensor) -> Metrics:
    """Accuracy and means of the rewards (B,) and of their margin."""
    metrics = pair_metrics(chosen - rejected, count)
    metrics["chosen_reward"] = chosen.detach().sum() / count
    metrics["rejected_reward"] = rejected.detach().sum() / count
    return metrics


def simpo_loss(
    chosen_mean_logps: Tensor,
    rejected_mean_logps: Tensor,
    beta: float,
    gamma: float,
    *,
    denominator: Denominator = None,
) -> tuple[Tensor, Metrics]:
    """SimPO (arXiv 2405.14734, equation 6): -log sigmoid(beta (c - r) - gamma).

    Args:
        chosen_mean_logps, rejected_mean_logps: (B,) mean log-prob per token (nats).
        gamma: target margin, in the unit of beta times nats.
        denominator: pairs of the global batch.

    Returns:
        The loss, and ``accuracy`` (c > r), ``margin`` (mean of beta (c - r)), ``chosen_reward``
        and ``rejected_reward`` (beta c and beta r).
    """
    check_same_shape(chosen_mean_logps=chosen_mean_logps, rejected_mean_logps=rejected_mean_logps)
    chosen, rejected = beta * upcast(chosen_mean_logps), beta * upcast(rejected_mean_logps)  # (B,)
    count = row_count(chosen, denominator)
    loss = F.softplus(gamma - (chosen - rejected)).sum() / count
    return loss, _reward_metrics(chosen, rejected, count)


def orpo_odds_loss(
    chosen_mean_logps: Tensor,
    rejected_mean_logps: Tensor,
    *,
    denominator: Denominator = None,
) -> tuple[Tensor, Metrics]:
    """The odds-ratio term of ORPO (arXiv 2403.07691, equation 7), without the SFT term.

    -log sigmoid(log odds(c) - log odds(r)), odds(p) = p / (1 - p), p = exp(mean log-prob).
    A mean log-prob above -1e-6 counts as -1e-6 (p = 1 has no finite odds) and gets no gradient.

    Args:
        chosen_mean_logps, rejected_mean_logps: (B,) mean log-prob per token (nats).
        denominator: pairs of the global batch.

    Returns:
        The loss, and ``accuracy``, ``margin`` (mean log odds ratio), ``chosen_reward`` and
        ``rejected_reward`` (their log odds).
    """
    check_same_shape(chosen_mean_logps=chosen_mean_logps, rejected_mean_logps=rejected_mean_logps)
    chosen = _log_odds(upcast(chosen_mean_logps))  # (B,)
    rejected = _log_odds(upcast(rejected_mean_logps))  # (B,)
    count = row_count(chosen, denominator)
    loss = F.softplus(rejected - chosen).sum() / count
    return loss, _reward_metrics(chosen, rejected, count)


def _log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(logps), by whichever of two forms keeps its digits."""
    logps = logps.clamp(max=_LARGEST_LOGP)
    near_one = logps > -math.log(2.0)
    log_rest = torch.where(
        near_one,
        torch.log(-torch.expm1(logps)),
        torch.log1p(-torch.exp(logps)),
    )
    return logps - log_rest


def kto_loss(
    logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    kl: float | Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    *,
    denominator: Denominator = None,
) -> tuple[Tensor, Metrics]:
    """Kahneman-Tversky optimisation (arXiv 2402.01306, equation 8), examples without pairs.

    weight (1 - sigmoid(+-beta (log-ratio - z))), + for desirable examples, z = max(kl, 0).

    Args:
        logps, ref_logps: (B,) log-probs of whole responses (nats). desirable: (B,) bool.
        kl: the batch's estimate of KL(policy || reference) (nats); never receives a gradient,
            and a negative estimate counts as 0, as in the paper.
        denominator: examples of the global batch.

    Returns:
        The loss, and ``accuracy`` (log-ratio on the right side of z, ties half) and
        ``margin`` (mean of +-beta (log-ratio - z)).
    """
    check_same_shape(logps=logps, ref_logps=ref_logps, desirable=desirable)
    if desirable.dtype != torch.bool:
        raise ValueError(f"desirable must be bool, found {desirable.dtype}")
    log_ratio = upcast(logps) - upcast(ref_logps.detach())  # (B,)
    z = kl.to(log_ratio) if isinstance(kl, Tensor) else log_ratio.new_full((), kl)  # ()
    z = z.detach().clamp(min=0)
    sign = torch.where(desirable, 1.0, -1.0)  # (B,)
    weight = torch.where(desirable, desirable_weight, undesirable_weight)  # (B,)
    margin = sign * beta * (log_ratio - z)  # (B,)
    count = row_count(margin, denominator)
    # 1 - sigmoid(x) = sigmoid(-x), without the cancellation
    loss = (weight * torch.sigmoid(-margin)).sum() / count
    return loss, pair_metrics(margin, count)
