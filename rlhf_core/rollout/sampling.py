"""Sampling: a random number per row and step, and the token that it selects.

B prompts, T response positions, V vocabulary, b rows still being decoded.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_BLOCK = 64  # tokens whose probabilities are summed first


def make_row_seeds(seed: int, step: int, rows: Sequence[int]) -> list[int]:
    """A 64-bit seed for each row of a step's global batch, independent of its rank.

    Args:
        seed: the job's. step: the rollout's. rows: indices into the global batch.
    """
    return [
        int(np.random.SeedSequence([seed, step, row]).generate_state(1, np.uint64)[0])
        for row in rows
    ]


def row_uniforms(seeds: Sequence[int], length: int) -> Tensor:
    """Uniform numbers in [0, 1), one per row and step, each row from its own Philox generator.

    A longer row starts with the numbers of a shorter one.

    Args:
        seeds: B non-negative integers below 2**128. length: T.

    Returns:
        (B,T) fp64.
    """
    if not seeds:
        return torch.zeros(0, length, dtype=torch.float64)
    rows = [np.random.Generator(np.random.Philox(key=s)).random(length) for s in seeds]
    return torch.from_numpy(np.stack(rows))


def sample_inverse_cdf(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The token at which the cumulative probability first exceeds a row's uniform number.

    The whole vocabulary, in two levels: sums of 64 neighbours first, then one block's tokens. A
    token whose logit is -inf is never drawn.

    Args:
        logits: (b,V) fp32. uniforms: (b,) in [0, 1).

    Returns:
        Token ids (b,), and the log-sum-exp of each row (b,) fp64, a by-product.
    """
    rows, vocabulary = logits.shape
    highest = logits.amax(dim=1, keepdim=True)  # (b,1)
    weights = (logits - highest).exp_()  # (b,V)
    if short := -vocabulary % _BLOCK:
        weights = torch.nn.functional.pad(weights, (0, short))
    weights = weights.view(rows, -1, _BLOCK)
    cumulative = weights.sum(dim=2).cumsum(dim=1, dtype=torch.float64)  # (b, V/64)
    target = uniforms.to(cumulative).unsqueeze(1) * cumulative[:, -1:]  # (b,1)
    block = _first_above(cumulative, target)  # (b,1)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp(min=0)), 0.0)  # (b,1)
    inside = weights.gather(1, block.unsqueeze(2).expand(-1, -1, _BLOCK)).squeeze(1)  # (b,64)
    offset = _first_above(inside.double().cumsum(dim=1), target - before)  # (b,1)
    norm = highest.double() + cumulative[:, -1:].log()  # (b,1)
    return (block * _BLOCK + offset).squeeze(1), norm.squeeze(1)


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """Index (b,1) of the first entry above target. If rounding leaves none, that of the last entry
    that adds something."""
    last = (cumulative < cumulative[:, -1:]).sum(dim=1, keepdim=True)
    return torch.minimum(torch.searchsorted(cumulative, target, right=True), last)
