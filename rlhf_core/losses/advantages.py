"""From scores to advantages: pure functions, none of which records a gradient.

B sequences, T response positions; a mask is bool and True is a real token. Padding on either side,
whatever it contains, changes nothing and comes out as 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhf_core.losses.ppo import KLEstimator, kl_estimate
from rlhf_core.losses.reductions import check_same_shape, upcast

_WHITEN_EPS = 1e-8
_GRPO_EPS = 1e-4


@torch.no_grad()
def token_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    kl_coef: float,
    kind: KLEstimator = "k1",
) -> Tensor:
    """The rewards that GAE takes: a KL penalty on every token, and the score on the last real one.

    -kl_coef (logprobs - ref_logprobs), plus the score (InstructGPT, arXiv 2203.02155, eq. 2). With
    another kind than k1, the policy gradient is not that of the KL (arXiv 2510.01555).

    Args:
        scores: (B,) of whole responses. logprobs, ref_logprobs: (B,T) nats. mask: (B,T) bool.
        kind: see `kl_estimate`.

    Returns:
        rewards (B,T).

    Raises:
        ValueError: a row has no real token, so that its score would be lost (the row is named).
    """
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask)
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"scores must be ({mask.shape[0]},), found {tuple(scores.shape)}")
    lengths = mask.sum(dim=1)  # (B,)
    if bool((lengths == 0).any()):
        row = int((lengths == 0).nonzero()[0])
        raise ValueError(f"row {row} has no real token that could carry its score")
    penalty = kl_coef * kl_estimate(logprobs, ref_logprobs, kind)  # (B,T)
    rewards = torch.where(mask, -penalty, torch.zeros_like(penalty))  # (B,T)
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).amax(dim=1, keepdim=True)  # (B,1)
    return rewards.scatter_add(1, last, scores.to(rewards.dtype).unsqueeze(1))


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, equation 16).

    A_t = delta_t + gamma lambda A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t, where t+1 is the
    next *real* token and the value after the last one is 0.

    Args:
        rewards, values: (B,T). mask: (B,T) bool.

    Returns:
        advantages (B,T), not whitened, and returns (B,T) = advantages + values.
    """
    check_same_shape(rewards=rewards, values=values, mask=mask)
    zero = torch.zeros((), device=values.device)
    rewards = torch.where(mask, upcast(rewards), zero)  # (B,T)
    values = torch.where(mask, upcast(values), zero)  # (B,T)
    advantages = torch.zeros_like(values)  # (B,T)
    next_value = torch.zeros_like(values[:, 0])  # (B,)
    next_advantage = torch.zeros_like(next_value)  # (B,)
    for t in reversed(range(values.shape[1])):
        real = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # skip padding: what follows it is carried over to what precedes it
        next_advantage = torch.where(
            real, delta + gamma * gae_lambda * next_advantage, next_advantage
        )
        next_value = torch.where(real, values[:, t], next_value)
        advantages[:, t] = torch.where(real, next_advantage, zero)
    return advantages, advantages + values


@torch.no_grad()
def returns_to_go(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """Return of each token: sum over itself and the later real tokens of gamma^k rewards.

    With ``token_rewards`` this is REINFORCE++'s advantage before whitening (arXiv 2501.03262): the
    score less kl_coef times the KL from here on.

    Args:
        rewards: (B,T). mask: (B,T) bool.

    Returns:
        (B,T), 0 at padded positions.
    """
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)[0]


@torch.no_grad()
def masked_moments(x: Tensor, mask: Tensor) -> Tensor:
    """(count, sum, sum of squares) of the real positions, as one fp64 tensor (3,).

    All-reduce it with a sum, then ``moments_to_stats``: that whitens over the global batch.
    fp64, because the variance is a difference of the two sums.
    """
    check_same_shape(x=x, mask=mask)
    real = torch.where(mask, x.double(), 0.0)  # (B,T)
    return torch.stack([mask.sum().double(), real.sum(), real.square().sum()])


def moments_to_stats(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance from the (3,) of ``masked_moments``.

    Raises:
        ValueError: fewer than two real tokens, which have no variance.
    """
    count, total, total_sq = moments.unbind()
    if count < 2:
        raise ValueError(f"whitening needs at least 2 real tokens, found {int(count)}")
    mean = total / count
    return mean, ((total_sq - count * mean.square()) / (count - 1)).clamp(min=0.0)


@torch.no_grad()
def masked_whiten(
    x: Tensor,
    mask: Tensor,
    shift_mean: bool = True,
    *,
    stats: tuple[Tensor | float, Tensor | float] | None = None,
) -> Tensor:
    """x scaled to unit variance over the real positions, with its mean removed or kept.

    (x - mean) / sqrt(var + 1e-8), plus the mean again where ``shift_mean`` is False; the variance
    is unbiased ("The N+ implementation details", arXiv 2403.17031).

    Args:
        x: (B,T). mask: (B,T) bool.
        stats: (mean, variance) of the global batch; None takes them from this call's tokens.

    Returns:
        (B,T), 0 at padded positions.

    Raises:
        ValueError: no stats were given and fewer than two tokens are real.
    """
    check_same_shape(x=x, mask=mask)
    mean, var = moments_to_stats(masked_moments(x, mask)) if stats is None else stats
    x = upcast(x)
    mean = torch.as_tensor(mean, dtype=x.dtype, device=x.device)
    var = torch.as_tensor(var, dtype=x.dtype, device=x.device)
    white = (x - mean) * torch.rsqrt(var + _WHITEN_EPS)  # (B,T)
    return torch.where(mask, white if shift_mean else white + mean, torch.zeros_like(white))


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over the real tokens: 1 is a perfect critic.

    Args:
        values, returns: (B,T). mask: (B,T) bool.

    Returns:
        A scalar; NaN where the returns do not vary at all.
    """
    check_same_shape(values=values, returns=returns, mask=mask)
    _, var_returns = moments_to_stats(masked_moments(returns, mask))
    _, var_error = moments_to_stats(masked_moments(upcast(returns) - upcast(values), mask))
    return torch.where(var_returns > 0, 1.0 - var_error / var_returns, torch.nan)


@torch.no_grad()
def group_advantages(
    scores: Tensor, group_size: int, kind: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
) -> Tensor:
    """Advantages from the other answers to the same prompt, without a critic.

    ``grpo``: (s - group mean) / (group std + 1e-4), unbiased std (arXiv 2402.03300).
    ``dr_grpo``: s - group mean (arXiv 2503.20783).
    ``rloo``: s - mean of the *other* answers of the group (leave-one-out, arXiv 2402.14740).

    Args:
        scores: (B,); each run of ``group_size`` neighbours answers one prompt.

    Returns:
        (B,).

    Raises:
        ValueError: B is not a multiple of group_size, group_size < 2, or an unknown kind.
    """
    if group_size < 2:
        raise ValueError(f"group_size must be at least 2 to compare answers, found {group_size}")
    if scores.dim() != 1 or scores.shape[0] % group_size:
        raise ValueError(
            f"scores must be (B,) with B a multiple of group_size {group_size}, "
            f"found {tuple(scores.shape)}"
        )
    groups = upcast(scores).view(-1, group_size)  # (G, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    # The mean of equal scores may be rounded, and grpo would divide by a deviation as small.
    flat = groups.amax(dim=1, keepdim=True) == groups.amin(dim=1, keepdim=True)  # (G, 1)
    centred = centred.masked_fill(flat, 0.0)
    if kind == "grpo":
        return (centred / (groups.std(dim=1, keepdim=True) + _GRPO_EPS)).reshape(-1)
    if kind == "dr_grpo":
        return centred.reshape(-1)
    if kind == "rloo":
        # s - (sum - s) / (n - 1) = (s - mean) n / (n - 1)
        return (centred * group_size / (group_size - 1)).reshape(-1)
    raise ValueError(f"found kind {kind!r}, needed 'grpo', 'dr_grpo' or 'rloo'")
