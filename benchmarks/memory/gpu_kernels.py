"""What kernels of a GPU keep: RMSNorm in one, and bitsandbytes' layers of 4 bits a weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf_core.nn.layers import transformer_layers

BLOCK, SECOND_BLOCK = 64, 256  # weights that share a scale; scales that share one


class _Norm(torch.autograd.Function):
    """As aten._fused_rms_norm, which takes no fake tensors of a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        needed = ctx.needs_input_grad[1]
        return torch.empty_like(x), torch.empty_like(weight) if needed else None


def fused_norm(norm: Any, x: Tensor) -> Tensor:
    """The norm of x (...,d)."""
    assert x.dtype == norm.weight.dtype
    return _Norm.apply(x, norm.weight)  # type: ignore[no-any-return]


class _Product(torch.autograd.Function):
    """x W', with W in half precision only while it is used."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.shape = shape
        return x @ packed.new_empty(shape, dtype=x.dtype).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (packed,) = ctx.saved_tensors
        return grad @ packed.new_empty(ctx.shape, dtype=grad.dtype), None, None


class Linear4bit(nn.Module):
    """A frozen linear layer in nf4, its scales quantised once more."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.shape = tuple(layer.weight.shape)
        count = layer.weight.numel()
        scales = -(-count // BLOCK)
        self.register_buffer("packed", torch.empty(-(-count // 2), dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(scales, dtype=torch.uint8))
        self.register_buffer("second", torch.empty(-(-scales // SECOND_BLOCK)))

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))
        return _Product.apply(x, self.packed, self.shape)  # type: ignore[no-any-return]


def quantize(model: nn.Module) -> None:
    """Hold the frozen linear layers of a model's transformer layers in nf4."""
    for part in list(transformer_layers(model)[1].modules()):
        for name, layer in list(part.named_children()):
            if isinstance(layer, nn.Linear) and not layer.weight.requires_grad:
                setattr(part, name, Linear4bit(layer))
