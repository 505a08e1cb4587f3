"""Trials: questions that only running a model answers, on generated rows, once per model."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

LENGTHS = (128, 72, 24)  # tokens of a trial's rows


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off inside the block; every submodule's own mode is restored after it."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """The context of a trial: eval mode, no gradients, no autocast."""
    device = next(model.parameters()).device.type
    device = "cpu" if device == "meta" else device  # a trial then has numbers of its own
    with eval_mode(model), torch.no_grad(), torch.autocast(device, enabled=False):
        yield


class Once(Protocol):
    """A trial that remembers its answers."""

    def __call__(self, model: Any) -> bool: ...

    def forget(self, model: Any) -> None:
        """Run it again the next time that it is asked about this model."""


def once(trial: Callable[[Any], bool]) -> Once:
    """Run a trial once per model, and keep the answer for as long as the model lives.

    The trial runs in `probing`. It runs again after the model has moved to another kind of device:
    a result from the CPU says nothing about a GPU's kernels.
    """
    answers: weakref.WeakKeyDictionary[nn.Module, dict[str, bool]] = weakref.WeakKeyDictionary()

    @functools.wraps(trial)
    def ask(model: Any) -> bool:
        known = answers.setdefault(model, {})
        device = next(model.parameters()).device.type
        if device not in known:
            with probing(model):
                known[device] = trial(model)
        return known[device]

    ask.forget = lambda model: answers.pop(model, None)  # type: ignore[attr-defined]
    return cast(Once, ask)


def trial_length(model: Any) -> int:
    """Tokens of a trial's longest row: 128, or fewer where a transformers model takes fewer."""
    longest = getattr(model.config, "max_position_embeddings", None)
    return min(LENGTHS[0], longest or LENGTHS[0])


def trial_rows(model: Any, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Generated rows of 128, 72 and 24 tokens, shorter in proportion where `trial_length` is less.

    Args:
        model: a transformers model. left: the padding comes first in each row.

    Returns:
        input_ids (3,S) and mask (3,S) bool, on the model's device.
    """
    weight, width = model.get_input_embeddings().weight, trial_length(model)
    lengths = [max(1, length * width // LENGTHS[0]) for length in LENGTHS]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, weight.shape[0], (len(LENGTHS), width), generator=generator)
    columns, ends = torch.arange(width), torch.tensor(lengths).unsqueeze(1)  # (S,), (3,1)
    mask = columns >= width - ends if left else columns < ends
    return ids.to(weight.device), mask.to(weight.device)


def difference(found: Tensor, want: Tensor) -> float:
    """The largest difference as a share of the largest number wanted, or the root mean square of
    the differences as a share of the numbers', whichever is more; NaN where a number is NaN.

    Raises:
        ValueError: the shapes differ.
    """
    if found.shape != want.shape:
        raise ValueError(f"the shape is {tuple(found.shape)}, not {tuple(want.shape)}")
    apart, want = (found.double() - want.double()).abs(), want.double().abs()
    shares = [
        apart.max() / want.max().clamp(min=1e-30),
        apart.square().mean().sqrt() / want.square().mean().sqrt().clamp(min=1e-30),
    ]
    return float(torch.stack(shares).max())


def tolerance(like: Tensor) -> float:
    """How large a `difference` may come from rounding alone.

    1e-5 in fp32 and fp64. In half precision each layer's output is rounded: six units in the last
    place, 0.006 in fp16 and 0.05 in bf16; 30 layers in which two thirds of all outputs are rounded
    the other way differ by less than four. A GPU that multiplies fp32 in TF32 rounds as in fp16.
    """
    dtype = like.dtype
    if like.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        dtype = torch.float16 if dtype == torch.float32 else dtype
    return max(1e-5, 6 * torch.finfo(dtype).eps)
