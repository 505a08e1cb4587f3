"""Products of a few rows with a large weight on a CPU, as a decoding step has them.

For some 4 to 56 rows MKL shares x W^T badly between two threads: W x^T, the same numbers the other
way round, takes a half to a third of the time. With more rows, or with one, there is no difference.
So linear layers compute it that way round while a model decodes (docs/performance.md has the
measurements).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST = 56  # rows
LEAST = 12
LEAST_OF_LARGE = 4  # rows, where the weight has this many elements:
LARGE = 2**19


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, by whichever way is faster; as `torch.nn.functional.linear` but for rounding.

    Args:
        x: (...,k). weight: (n,k). bias: (n,) or None.

    Returns:
        (...,n), contiguous.
    """
    rows = x.numel() // max(1, x.shape[-1])
    if not _turned(rows, x, weight):
        return F.linear(x, weight, bias)
    found = torch.mm(weight, x.reshape(rows, -1).t()).t().contiguous()  # (rows,n)
    if bias is not None:
        found += bias
    return found.view(*x.shape[:-1], weight.shape[0])


def _turned(rows: int, x: Tensor, weight: Tensor) -> bool:
    least = LEAST_OF_LARGE if weight.numel() >= LARGE else LEAST
    return (
        least <= rows <= MOST
        and x.dtype == weight.dtype
        and not torch.is_grad_enabled()
        and _in_fp32_on_a_cpu(weight)
    )


def _in_fp32_on_a_cpu(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    )


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)


@contextlib.contextmanager
def few_rows(model: nn.Module) -> Iterator[None]:
    """Within it, a model's linear layers take the faster way.

    Plain layers only, those inside adapters too: one whose forward somebody has replaced, or of a
    class of its own, stays as it is. So does a model to which it cannot apply, on a GPU or in half
    precision: each layer's call would only take longer.
    """
    layers = [
        m for m in model.modules()
        if type(m) is nn.Linear and "forward" not in vars(m) and _in_fp32_on_a_cpu(m.weight)
    ]  # fmt: skip
    try:
        for layer in layers:
            layer.forward = functools.partial(_forward, layer)  # type: ignore[method-assign]
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
