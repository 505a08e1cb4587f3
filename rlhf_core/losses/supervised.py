"""Losses of supervised fine-tuning and of the reward model. Conventions: `rlhf_core.losses`."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from rlhf_core.losses.reductions import (
    Denominator,
    Metrics,
    check_same_shape,
    masked_mean,
    pair_metrics,
    row_count,
    upcast,
)


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
    margins: Tensor | None = None,
    center_coef: float = 0.0,
    denominator: Denominator = None,
) -> tuple[Tensor, Metrics]:
    """Bradley-Terry loss of a reward model (InstructGPT, arXiv 2203.02155, equation 1).

    ``log_sig`` is -log sigmoid(c - r), ``log_exp`` is log(1 + exp(r - c)): two spellings of one
    function, both computed as softplus(r - c). With margins m it is softplus(m - (c - r)) (Llama 2,
    arXiv 2307.09288, equation 2); with ``center_coef`` the mean of center_coef (c + r)^2 is added,
    which the loss alone leaves undetermined (arXiv 2312.09244, section 2).

    Args:
        chosen_scores: (B,). rejected_scores: (B,).
        margins: (B,) by which c - r has to exceed 0; None: 0.
        denominator: pairs of the global batch.

    Returns:
        The loss, and ``accuracy`` (ties count half) and ``margin`` (mean of c - r).
    """
    if kind not in ("log_sig", "log_exp"):
        raise ValueError(f"found kind {kind!r}, needed 'log_sig' or 'log_exp'")
    check_same_shape(chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    chosen, rejected = upcast(chosen_scores), upcast(rejected_scores)  # (B,) each
    margin = chosen - rejected  # (B,)
    if margins is not None:
        check_same_shape(margins=margins, scores=margin)
    count = row_count(margin, denominator)
    loss = F.softplus(-margin if margins is None else margins - margin).sum() / count
    if center_coef:
        loss = loss + center_coef * (chosen + rejected).square().sum() / count
    return loss, pair_metrics(margin, count)
