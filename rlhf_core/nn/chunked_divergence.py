"""Divergence of a student from a teacher over the whole vocabulary, in chunks of positions.

Both heads' logits of a chunk exist at once, never all (N,V). The gradient is computed in the
forward pass, for an upstream gradient of 1, and scaled in the backward pass: the teacher need not
be there any more, and no logits are kept or computed twice. (The way of chunked_logprobs for a
frozen head; what it costs is memory for a gradient of the head's weight between the passes.)

N positions, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_core.losses.distillation import divergence_with_gradient
from rlhf_core.nn.chunked_logprobs import HeadOptions, cast_head, product_dtype, rows_at_once
from rlhf_core.nn.vocabulary_head import Head

TeacherLogits = Callable[[slice], Tensor]
"""Logits (n,V') fp32 of the teacher at some of the N positions, at temperature 1."""


class _Settings(NamedTuple):
    head: HeadOptions
    beta: float
    vocabulary: int  # tokens that both have: embeddings may be padded to different sizes
    trains: bool


class _DivergenceSum(torch.autograd.Function):
    """Sum over the positions, scalar."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: TeacherLogits,
        settings: _Settings,
    ) -> Tensor:
        options, common = settings.head, settings.vocabulary
        need_h, need_w, need_b = (settings.trains and need for need in ctx.needs_input_grad[:3])
        exact = torch.promote_types(options.dtype, torch.float32)
        total = torch.zeros((), dtype=exact, device=hidden.device)
        grad_h = torch.empty_like(hidden) if need_h else None
        grad_w = torch.zeros_like(weight, dtype=exact) if need_w else None
        grad_b = torch.zeros_like(bias, dtype=exact) if need_b and bias is not None else None
        with torch.autocast(hidden.device.type, enabled=False):
            w, b = cast_head(weight, bias, options.dtype)
            for start in range(0, hidden.shape[0], options.chunk):
                rows = slice(start, min(start + options.chunk, hidden.shape[0]))
                logits = options.logits(hidden[rows], w, b)  # (n,V)
                q = torch.log_softmax(logits[:, :common], dim=1)
                other = teacher(rows)[:, :common].to(exact)
                p = torch.log_softmax(other / options.temperature, dim=1)
                value, grad = divergence_with_gradient(q, p, settings.beta)  # (n,), (n,common)
                total += value.sum()
                if not settings.trains:
                    continue
                if options.softcap is not None:
                    tanh = logits[:, :common] * (options.temperature / options.softcap)
                    grad.mul_(1 - tanh.square_())
                grad.mul_(options.factor)
                if grad_b is not None:
                    grad_b[:common] += grad.sum(dim=0)
                half = grad.to(options.dtype)
                if grad_h is not None:
                    grad_h[rows] = half @ w[:common]
                if grad_w is not None:
                    grad_w[:common] += half.t() @ hidden[rows].to(options.dtype)
        ctx.save_for_backward(grad_h, grad_w, grad_b)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        grad_h, grad_w, grad_b = ctx.saved_tensors
        of_weight, of_bias = ctx.dtypes
        return (
            None if grad_h is None else grad_h * upstream.to(grad_h.dtype),
            None if grad_w is None else (grad_w * upstream).to(of_weight),
            None if grad_b is None else (grad_b * upstream).to(of_bias),
            None,
            None,
        )


def divergence_sum(
    hidden: Tensor,
    head: Head,
    teacher: TeacherLogits,
    beta: float,
    temperature: float,
    vocabulary: int,
    chunk: int | None = None,
) -> Tensor:
    """`losses.distillation.divergence` summed over N positions (nats), a scalar.

    Args:
        hidden: (N,d) of the student. head: the student's.
        vocabulary: number of tokens that both models have; only these count.
        chunk: rows at a time; None fits them to the vocabulary and device.
    """
    if hidden.shape[0] == 0:  # an empty micro-batch still takes part in the backward pass
        return hidden.sum().float() + 0 * head.weight[:1].sum().float()
    # Of student and teacher there are about four times the arrays of plain log-probabilities.
    rows = chunk or max(1, rows_at_once(hidden, head.weight.shape[0]) // 4)
    dtype = product_dtype(hidden, head.weight)
    options = HeadOptions(dtype, rows, temperature, head.scale, head.softcap, False)
    settings = _Settings(options, beta, vocabulary, torch.is_grad_enabled())
    total = _DivergenceSum.apply(hidden, head.weight, head.bias, teacher, settings)
    return cast(Tensor, total)
