"""What is known of a model only by trying it out, on a few made-up tokens: once per model."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def once(trial: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A question to a model whose answer is kept for as long as the model lives.

    The trial itself runs in eval mode, without gradients and without autocast; every submodule's
    own mode is restored.
    """
    answers: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()

    @functools.wraps(trial)
    def ask(model: Any) -> bool:
        if model not in answers:
            kind = next(model.parameters()).device.type
            training = [m for m in model.modules() if m.training]
            model.eval()
            try:
                with torch.no_grad(), torch.autocast(kind, enabled=False):
                    answers[model] = trial(model)
            finally:
                for module in training:
                    module.training = True
        return answers[model]

    return ask


def same_numbers(found: Tensor, want: Tensor, near: float = 1e-5) -> bool:
    """Whether two results differ by rounding alone.

    Args:
        near: tolerance in fp32 and fp64, as a share of the number and of the largest; half
            precision has 0.02.
    """
    if found.dtype not in (torch.float32, torch.float64):
        near = 2e-2
    return torch.allclose(found, want, rtol=near, atol=near * float(want.abs().max()))
