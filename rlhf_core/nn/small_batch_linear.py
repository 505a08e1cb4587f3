"""Products of a few rows with a large weight on a CPU, as a decoding step has them.

For some 4 to 56 rows MKL shares x W^T badly between two threads: W x^T, the same numbers in another
layout, takes a half to a third of the time. With more rows, or with one, there is no difference.
Only in fp32 on a CPU; nothing on a GPU's way knows of this module (docs/performance.md has the
measurements).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_core.nn.fast_paths import FastPath, Pairs, patched, switched_on

MAX_ROWS = 56
MIN_ROWS = 12
MIN_ROWS_LARGE = 4  # where the weight has this many elements:
LARGE = 2**19


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, in whichever layout is faster; as `F.linear` but for rounding.

    Args:
        x: (...,k). weight: (n,k). bias: (n,) or None.

    Returns:
        (...,n), contiguous.
    """
    rows = x.numel() // max(1, x.shape[-1])
    if not _is_faster(rows, x, weight):
        return F.linear(x, weight, bias)
    product = torch.mm(weight, x.reshape(rows, -1).t()).t().contiguous()  # (rows,n)
    if bias is not None:
        product += bias
    return product.view(*x.shape[:-1], weight.shape[0])


def _is_faster(rows: int, x: Tensor, weight: Tensor) -> bool:
    least = MIN_ROWS_LARGE if weight.numel() >= LARGE else MIN_ROWS
    return (
        least <= rows <= MAX_ROWS
        and x.dtype == weight.dtype
        and not torch.is_grad_enabled()
        and _is_fp32_on_cpu(weight)
    )


def _is_fp32_on_cpu(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    )


def _plain_layers(model: nn.Module) -> list[nn.Linear]:
    """A model's linear layers, those inside adapters too; none that somebody else has changed."""
    return [
        m for m in model.modules()
        if type(m) is nn.Linear and "forward" not in vars(m) and _is_fp32_on_cpu(m.weight)
    ]  # fmt: skip


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)


@contextlib.contextmanager
def installed(model: nn.Module) -> Iterator[None]:
    """Inside the block, the linear layers of a model for which `is_used` take the faster layout."""
    layers = _plain_layers(model) if is_used(model) else []
    with patched(*((layer, "forward", functools.partial(_forward, layer)) for layer in layers)):
        yield


def is_used(model: nn.Module) -> bool:
    """Whether a model has layers that it applies to: on a CPU, in fp32."""
    return switched_on() and bool(_plain_layers(model)) and PATH.works(model)


def _trial(model: Any) -> Pairs:
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for layer in {layer.weight.shape: layer for layer in _plain_layers(model)}.values():
        x = torch.randn(16, layer.in_features, generator=generator)
        pairs.append((_forward(layer, x), F.linear(x, layer.weight, layer.bias)))
    return pairs


PATH = FastPath(
    "linear layers for a few rows",
    "up to half of the time of decoding on a CPU",
    _trial,
)
