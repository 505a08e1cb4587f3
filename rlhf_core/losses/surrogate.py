"""Surrogates of the policy gradient: what a token adds to the loss, and where its gradient ends.

Conventions: `rlhf_core.losses`. r is the ratio exp(logprobs - old_logprobs) of a token, A its
advantage. In the first update of a rollout r is 1 everywhere, and all of them have the gradient of
-A logprobs (``gspo``: of its mean over a reply).

``clip``: max(-r A, -clip(r, 1 - clip_range, 1 + clip_range_high) A) (PPO, arXiv 1707.06347,
eq. 7; a clip_range_high of its own: DAPO, arXiv 2503.14476, section 3.1).
``gspo``: the same with the ratio of the reply, exp(mean of logprobs - old_logprobs over its
tokens) (arXiv 2507.18071, eqs. 5 and 7); A must be one number per reply.
``cispo``: -sg(min(r, 1 + clip_range_high)) A logprobs, sg without a gradient (MiniMax-M1, arXiv
2506.13585, eqs. 4 and 5, without a lower bound as in its experiments). Nothing is stopped;
``high`` are the tokens whose weight is capped, whatever the sign of A.
``dppo``: -r A, or 0 where the token's probability has changed by more than clip_range (A < 0,
fallen) or clip_range_high (A > 0, risen) (arXiv 2602.04879, eqs. 11 to 13, binary total
variation). The paper measures from the sampler's probabilities, this from ``old_logprobs``.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Objective = Literal["clip", "gspo", "cispo", "dppo"]


class Surrogate(NamedTuple):
    """What the tokens add to the loss, before averaging."""

    per_token: Tensor  # (B,T)
    low: Tensor  # (B,T) bool, stopped because A < 0 and the token has become unlikely enough
    high: Tensor  # (B,T) bool, stopped because A > 0 and it has become likely enough
    dual: Tensor | None  # (B,T) bool, stopped by dual_clip


def surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    objective: Objective,
    clip_range: float,
    clip_range_high: float | None,
    dual_clip: float | None,
) -> Surrogate:
    """One of the surrogates above, negated.

    Args:
        logprobs, old_logprobs, advantages: (B,T), finite at every position, and 0 at padding; only
            ``logprobs`` may have a gradient.
        mask: (B,T) bool.
        clip_range_high: None takes clip_range.
        dual_clip: with A < 0, r counts as at most this (arXiv 1912.09729, eq. 7; the delta of
            INTELLECT-2, arXiv 2505.07291). ``clip`` and ``dppo`` only.

    Raises:
        ValueError: an unknown objective.
    """
    log_ratio = logprobs - old_logprobs  # (B,T)
    if objective == "gspo":
        log_ratio = mean_of_reply(log_ratio, mask)  # (B,T)
    ratio = log_ratio.detach().exp()  # (B,T)
    if clip_range_high is None:
        clip_range_high = clip_range
    low, high = 1.0 - clip_range, 1.0 + clip_range_high
    if objective == "cispo":
        per_token = -advantages * ratio.clamp(max=high) * logprobs  # (B,T)
        return Surrogate(per_token, torch.zeros_like(mask), ratio > high, None)
    if objective == "dppo":
        change = logprobs.detach().exp() - old_logprobs.exp()  # (B,T) of the probability
        is_low, is_high = change < -clip_range, change > clip_range_high
        bounded = torch.zeros_like(ratio)  # (B,T)
    elif objective in ("clip", "gspo"):
        is_low, is_high = ratio < low, ratio > high
        bounded = ratio.clamp(low, high)  # (B,T)
    else:
        raise ValueError(f"found objective {objective!r}, needed clip, gspo, cispo or dppo")
    is_low, is_high = is_low & (advantages < 0), is_high & (advantages > 0)
    stopped, dual = is_low | is_high, None
    if dual_clip is not None:
        dual = (advantages < 0) & (ratio > dual_clip)
        stopped, bounded = stopped | dual, torch.where(dual, dual_clip, bounded)
    # The branch is chosen before exp: through torch.maximum a ratio that overflowed would send
    # back 0 * inf = NaN from a token that the clip has stopped, or that has no advantage.
    still = stopped | (advantages == 0)
    free = torch.where(still, torch.zeros_like(log_ratio), log_ratio).exp()  # (B,T)
    return Surrogate(-advantages * torch.where(stopped, bounded, free), is_low, is_high, dual)


def mean_of_reply(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """Each token gets the mean over its reply's: (B,T) -> (B,T), 0 where no token is real."""
    total = torch.where(mask, log_ratio, torch.zeros_like(log_ratio)).sum(1, keepdim=True)  # (B,1)
    return (total / mask.sum(dim=1, keepdim=True).clamp(min=1)).expand_as(log_ratio)
