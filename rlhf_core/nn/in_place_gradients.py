"""Gradients that are added up where they lie, over the micro-batches of an optimizer step.

Autograd makes a gradient of its own in each backward pass and adds it to the one that is there: a
matrix as large as the weight is written, read and thrown away each time, and for an embedding all
of it is zeros but for the rows of the tokens that came. Here a linear layer's product is added to
the gradient as it is computed, and an embedding adds those rows alone. The numbers are the same
but for rounding.

Only where nothing waits for the gradient on its way (DDP, ZeRO), and for `backward`, not
`torch.autograd.grad`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def add_in_place(module: nn.Module) -> None:
    """Let the backward pass of a module's trained weights add to their gradients where they lie.

    That are the weights of plain linear layers and embeddings; vocabulary heads heed it by
    themselves (`rlhf_core.nn.response_logprobs`). Layers of another class stay as they are.
    """
    for parameter in module.parameters():
        parameter.adds_in_place = parameter.requires_grad  # type: ignore[attr-defined]
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Linear
        elif type(layer) is nn.Embedding and not _odd(layer):
            layer.__class__ = Embedding


def is_linear(layer: Any) -> bool:
    """Whether a layer computes x W^T + b and nothing else."""
    return type(layer) in (nn.Linear, Linear)


def gathered(parameter: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The gradient to add to, or None where there is none yet or it must not be changed here."""
    found = parameter.grad if getattr(parameter, "adds_in_place", False) else None
    return found if found is not None and found.dtype == dtype else None


def hand_over(parameter: Tensor, grad: Tensor) -> Tensor | None:
    """A parameter's first gradient becomes its `grad` at once, so that others can add to it.

    Returns:
        What a backward function must return for the parameter: None, or `grad` where autograd is to
        take it.
    """
    grad = grad.to(parameter.dtype)
    if not getattr(parameter, "adds_in_place", False) or parameter.grad is not None:
        return grad
    parameter.grad = grad
    return None


class Linear(nn.Linear):
    """`torch.nn.Linear`, but for where its gradient is added."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if (
            torch.is_grad_enabled()
            and getattr(weight, "adds_in_place", False)
            and x.dtype == weight.dtype
            and not torch.is_autocast_enabled(x.device.type)
        ):
            return cast(Tensor, _Linear.apply(x, weight, self.bias))
        return F.linear(x, weight, self.bias)


class _Linear(torch.autograd.Function):
    """x (...,k), weight (n,k), bias (n,) or None -> (...,n)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        grad_x = grad_weight = None
        rows = grad.reshape(-1, grad.shape[-1])  # (N,n)
        if need_x:
            grad_x = (rows @ weight).view_as(x)
        if need_weight:
            inputs = x.reshape(-1, x.shape[-1])  # (N,k)
            place = gathered(weight, rows.dtype)
            if place is not None:
                place.addmm_(rows.t(), inputs)
            else:
                grad_weight = hand_over(weight, rows.t() @ inputs)
        return grad_x, grad_weight, rows.sum(dim=0) if need_bias else None


class Embedding(nn.Embedding):
    """`torch.nn.Embedding`, but for where its gradient is added."""

    def forward(self, input: Tensor) -> Tensor:
        # on a GPU `index_add_` adds in any order
        in_place = self.weight.device.type == "cpu" and getattr(self.weight, "adds_in_place", False)
        if in_place and torch.is_grad_enabled():
            return cast(Tensor, _Embedding.apply(input, self.weight, self.padding_idx))
        return super().forward(input)


class _Embedding(torch.autograd.Function):
    """ids (...), weight (V,d) -> (...,d); the padding token's row gets no gradient."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(ids, weight)
        ctx.padding = padding
        return F.embedding(ids, weight, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None]:
        ids, weight = ctx.saved_tensors
        ids, rows = ids.flatten(), grad.reshape(-1, grad.shape[-1])  # (N,), (N,d)
        if ctx.padding is not None:
            real = ids != ctx.padding
            ids, rows = ids[real], rows[real]
        place = gathered(weight, rows.dtype)
        if place is not None:
            place.index_add_(0, ids, rows)
            return None, None, None
        first = torch.zeros_like(weight, dtype=rows.dtype).index_add_(0, ids, rows)
        return None, hand_over(weight, first), None


def _odd(layer: nn.Embedding) -> bool:
    """Whether an embedding does more than take rows."""
    return layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse
