"""Losses as pure functions: tensors in, ``(loss, metrics)`` out.

Conventions, the same in every function:

* B sequences (or pairs), T response positions. A mask is bool, True is a real token.
* Log-probabilities are in nats and at the sampling temperature.
* Half-precision inputs are raised to fp32 first, so every loss is finite in bf16 and fp16.
* What stands in padded places (NaN, inf, garbage) reaches neither the loss nor a gradient.
* ``denominator``: a loss is a mean over the real tokens (or pairs) of the *global* batch. Pass
  the global count and the losses of all micro-batches and ranks *sum* to that mean; None means
  "this call is the whole batch". Metrics that are means share the denominator, so they sum too;
  metrics whose name ends in ``_max`` combine by maximum.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Metrics = dict[str, Tensor]
Denominator = float | Tensor | None

# ORPO's odds p / (1 - p) have a pole at p = 1, which a low-precision mean log-prob of 0 reaches.
_LARGEST_LOGP = -1e-6


# ----------------------------------------------------------------------------- shared helpers
def upcast(x: Tensor) -> Tensor:
    """x in fp32, or unchanged where it is fp64 already."""
    return x if x.dtype == torch.float64 else x.float()


def check_same_shape(**tensors: Tensor) -> None:
    """Refuses tensors that would broadcast against each other: that is always a bug here.

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
    """Sum of x (B,T) over the True places of mask (B,T), a scalar."""
    return torch.where(mask, x, torch.zeros_like(x)).sum()


def masked_mean(x: Tensor, mask: Tensor, denominator: Denominator = None) -> Tensor:
    """Sum of x (B,T) over mask (B,T), divided by the denominator (None: the number of True).

    Raises:
        ValueError: no denominator was given and no place of the mask is True.
    """
    check_same_shape(x=x, mask=mask)
    return masked_sum(x, mask) / _token_count(mask, denominator)


def _token_count(mask: Tensor, denominator: Denominator) -> float | Tensor:
    if denominator is not None:
        return denominator
    count = mask.sum()
    if count == 0:
        raise ValueError(
            f"the mask {tuple(mask.shape)} holds no real token, at least one is needed; "
            "pass the global batch's count as denominator if this micro-batch may be empty"
        )
    return count


def _row_count(x: Tensor, denominator: Denominator) -> float | Tensor:
    if denominator is not None:
        return denominator
    if x.shape[0] == 0:
        raise ValueError("found a batch of 0 rows, at least one is needed")
    return float(x.shape[0])


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


def _pair_metrics(margin: Tensor, count: float | Tensor) -> Metrics:
    """Accuracy (a tie counts half) and mean of the margins (B,)."""
    margin = margin.detach()
    accuracy = ((margin > 0).float() + 0.5 * (margin == 0).float()).sum() / count
    return {"accuracy": accuracy, "margin": margin.sum() / count}


# ------------------------------------------------------------------- supervised, reward model
def sft_loss(
    logprobs: Tensor, mask: Tensor, *, denominator: Denominator = None
) -> tuple[Tensor, Metrics]:
    """Cross-entropy of the trained tokens: mean of -logprobs over the mask (nats per token).

    Args:
        logprobs: (B,T) log-probability of each label. mask: (B,T) bool.
        denominator: trained tokens of the global batch.
    """
    check_same_shape(logprobs=logprobs, mask=mask)
    loss = masked_mean(-upcast(logprobs), mask, denominator)
    return loss, {"nll": loss.detach()}


def pairwise_loss(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    kind: Literal["log_sig", "log_exp"] = "log_sig",
    *,
    denominator: Denominator = None,
) -> tuple[Tensor, Metrics]:
    """Bradley-Terry loss of a reward model (InstructGPT, arXiv 2203.02155, equation 1).

    ``log_sig`` is -log sigmoid(c - r), ``log_exp`` is log(1 + exp(r - c)): two spellings of one
    function, both computed as softplus(r - c).

    Args:
        chosen_scores: (B,). rejected_scores: (B,).
        denominator: pairs of the global batch.

    Returns:
        The loss, and ``accuracy`` (ties count half) and ``margin`` (mean of c - r).
    """
    if kind not in ("log_sig", "log_exp"):
        raise ValueError(f"found kind {kind!r}, needed 'log_sig' or 'log_exp'")
    check_same_shape(chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    margin = upcast(chosen_scores) - upcast(rejected_scores)  # (B,)
    count = _row_count(margin, denominator)
    return F.softplus(-margin).sum() / count, _pair_metrics(margin, count)


# ---------------------------------------------------------------------------------------- PPO
def kl_estimate(
    logprobs: Tensor, ref_logprobs: Tensor, kind: Literal["k1", "k2", "k3"] = "k1"
) -> Tensor:
    """Per-token estimates of KL(policy || reference) from the policy's own samples (nats).

    John Schulman, "Approximating KL divergence": k1 = logprobs - ref_logprobs (unbiased, may be
    negative), k2 = k1^2 / 2 (biased, low variance), k3 = exp(-k1) - 1 + k1 (unbiased, never
    negative). Takes no mask: padded places come out as garbage if they went in as garbage.

    Args:
        logprobs: (B,T) of the policy that sampled. ref_logprobs: (B,T) of the reference.

    Returns:
        (B,T).
    """
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    k1 = upcast(logprobs) - upcast(ref_logprobs)  # (B,T)
    if kind == "k1":
        return k1
    if kind == "k2":
        return k1.square() / 2
    if kind == "k3":
        return torch.expm1(-k1) + k1
    raise ValueError(f"found kind {kind!r}, needed 'k1', 'k2' or 'k3'")


def ppo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float,
    *,
    denominator: Denominator = None,
) -> tuple[Tensor, Metrics]:
    """Clipped surrogate objective (PPO, arXiv 1707.06347, equation 7), negated.

    Per token max(-r A, -clip(r, 1 - clip_range, 1 + clip_range) A), r = exp(logprobs - old).

    Args:
        logprobs, old_logprobs, advantages: (B,T); only ``logprobs`` receives a gradient.
        mask: (B,T) bool. denominator: real tokens of the global batch.

    Returns:
        The loss, and ``clip_fraction`` (tokens whose gradient the clip stops), ``approx_kl``
        (k3 of KL(old || new), nats), ``ratio_mean``, ``ratio_max`` (0 where no token is real).
    """
    check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    zero = torch.zeros((), device=logprobs.device)
    logprobs = torch.where(mask, upcast(logprobs), zero)  # (B,T)
    old_logprobs = torch.where(mask, upcast(old_logprobs.detach()), zero)  # (B,T)
    advantages = torch.where(mask, upcast(advantages.detach()), zero)  # (B,T)
    log_ratio = logprobs - old_logprobs  # (B,T)
    ratio = log_ratio.detach().exp()  # (B,T)
    low, high = 1.0 - clip_range, 1.0 + clip_range
    clipped = torch.where(advantages > 0, ratio > high, (advantages < 0) & (ratio < low))
    # The branch is chosen before exp: through torch.maximum a ratio that overflowed would send
    # back 0 * inf = NaN from a token that the clip has stopped.
    free_ratio = torch.where(clipped, zero, log_ratio).exp()  # (B,T)
    per_token = -advantages * torch.where(clipped, ratio.clamp(low, high), free_ratio)  # (B,T)
    count = _token_count(mask, denominator)
    loss = masked_sum(per_token, mask) / count
    k3 = kl_estimate(old_logprobs, logprobs.detach(), "k3")  # (B,T)
    metrics = {
        "clip_fraction": masked_sum(clipped.float(), mask) / count,
        "approx_kl": masked_sum(k3, mask) / count,
        "ratio_mean": masked_sum(ratio, mask) / count,
        "ratio_max": torch.where(mask, ratio, zero).max() if mask.numel() else zero,
    }
    return loss, metrics


def ppo_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    value_clip_range: float | None,
    *,
    denominator: Denominator = None,
) -> tuple[Tensor, Metrics]:
    """Clipped squared error of the critic ("The N+ implementation details", arXiv 2403.17031).

    Per token max((v - R)^2, (old + clip(v - old, +-value_clip_range) - R)^2) / 2.

    Args:
        values, old_values, returns: (B,T); only ``values`` receives a gradient.
        mask: (B,T) bool. value_clip_range: None does not clip.
        denominator: real tokens of the global batch.

    Returns:
        The loss, and ``clip_fraction`` (tokens where the clipped error is the larger),
        ``value_mean``, ``return_mean`` and ``squared_error`` (unclipped, without the 1/2).
    """
    check_same_shape(values=values, old_values=old_values, returns=returns, mask=mask)
    zero = torch.zeros((), device=values.device)
    values = torch.where(mask, upcast(values), zero)  # (B,T)
    old_values = torch.where(mask, upcast(old_values.detach()), zero)  # (B,T)
    returns = torch.where(mask, upcast(returns.detach()), zero)  # (B,T)
    error = (values - returns).square()  # (B,T)
    worst, clipped = error, torch.zeros_like(mask)
    if value_clip_range is not None:
        near = old_values + (values - old_values).clamp(-value_clip_range, value_clip_range)
        clipped_error = (near - returns).square()  # (B,T)
        worst, clipped = torch.maximum(error, clipped_error), clipped_error > error
    count = _token_count(mask, denominator)
    metrics = {
        "clip_fraction": masked_sum(clipped.float(), mask) / count,
        "value_mean": values.detach().sum() / count,
        "return_mean": returns.sum() / count,
        "squared_error": error.detach().sum() / count,
    }
    return 0.5 * masked_sum(worst, mask) / count, metrics


# -------------------------------------------------------------------- preference optimisation
def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
    *,
    denominator: Denominator = None,
) -> tuple[Tensor, Metrics]:
    """Direct preference optimisation (arXiv 2305.18290, equation 7).

    -log sigmoid(beta ((c - ref c) - (r - ref r))) over whole-response log-probs (nats, sums).

    Args:
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: (B,).
        denominator: pairs of the global batch.

    Returns:
        The loss, and ``accuracy``, ``margin``, ``chosen_reward``, ``rejected_reward`` (the
        implicit rewards, beta times the log-ratio).
    """
    check_same_shape(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    chosen = beta * (upcast(chosen_logps) - upcast(ref_chosen_logps.detach()))  # (B,)
    rejected = beta * (upcast(rejected_logps) - upcast(ref_rejected_logps.detach()))  # (B,)
    count = _row_count(chosen, denominator)
    metrics = _pair_metrics(chosen - rejected, count)
    metrics["chosen_reward"] = chosen.detach().sum() / count
    metrics["rejected_reward"] = rejected.detach().sum() / count
    return F.softplus(rejected - chosen).sum() / count, metrics


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
        The loss, and ``accuracy`` (c > r) and ``margin`` (mean of beta (c - r)).
    """
    check_same_shape(chosen_mean_logps=chosen_mean_logps, rejected_mean_logps=rejected_mean_logps)
    margin = beta * (upcast(chosen_mean_logps) - upcast(rejected_mean_logps))  # (B,)
    count = _row_count(margin, denominator)
    return F.softplus(gamma - margin).sum() / count, _pair_metrics(margin, count)


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
        The loss, and ``accuracy`` and ``margin`` (mean log odds ratio).
    """
    check_same_shape(chosen_mean_logps=chosen_mean_logps, rejected_mean_logps=rejected_mean_logps)
    margin = _log_odds(upcast(chosen_mean_logps)) - _log_odds(upcast(rejected_mean_logps))  # (B,)
    count = _row_count(margin, denominator)
    return F.softplus(-margin).sum() / count, _pair_metrics(margin, count)


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
    z = torch.as_tensor(kl, dtype=log_ratio.dtype, device=log_ratio.device).detach().clamp(min=0)
    sign = torch.where(desirable, 1.0, -1.0)  # (B,)
    weight = torch.where(desirable, desirable_weight, undesirable_weight)  # (B,)
    margin = sign * beta * (log_ratio - z)  # (B,)
    count = _row_count(margin, denominator)
    # 1 - sigmoid(x) = sigmoid(-x), without the cancellation
    loss = (weight * torch.sigmoid(-margin)).sum() / count
    return loss, _pair_metrics(margin, count)
