"""RMSNorm as one kernel on a GPU.

transformers computes it step by step, and each step reads and writes all hidden states: 28 bytes
per number in a forward pass in fp32, where 8 are needed. A GPU's matrix products wait for that. On
a CPU it makes no difference, so there the model's own code runs.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_core.nn.fast_paths import FastPath, Pairs, switched_on

_ROWS = 4  # of a trial


def install(model: nn.Module) -> None:
    """Let the norms of a model take one kernel wherever their input is on a GPU.

    It stays for as long as the model lives: gradient checkpointing calls the norms again in the
    backward pass.
    """
    # Models are loaded before a rank moves them to its device. Where there is no GPU, the log need
    # not say which norms would not suit one.
    norms = _norms(model) if torch.cuda.is_available() else []
    if norms and PATH.works(model):
        for norm in norms:
            norm.forward = functools.partial(_forward, norm)


def _norms(model: nn.Module) -> list[Any]:
    """RMSNorms with one weight per number; none that somebody else has changed."""
    return [
        m for m in model.modules()
        if type(m).__name__.endswith("RMSNorm") and "forward" not in vars(m)
        and [(name, p.dim()) for name, p in m.named_parameters()] == [("weight", 1)]
        and _epsilon(m) is not None
    ]  # fmt: skip


def _epsilon(norm: Any) -> float | None:
    found = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return found if isinstance(found, float) else None


def _forward(norm: Any, x: Tensor) -> Tensor:
    """The norm of x (...,d)."""
    suits = x.device.type != "cpu" and x.dtype == norm.weight.dtype
    if not suits or not switched_on():
        return type(norm).forward(norm, x)  # type: ignore[no-any-return]
    with torch.autocast(x.device.type, enabled=False):
        return fused(norm, x)


def fused(norm: Any, x: Tensor) -> Tensor:
    """x / sqrt(mean(x²) + eps) times the weight, (...,d)."""
    return F.rms_norm(x, (x.shape[-1],), norm.weight, _epsilon(norm))


def _trial(model: Any) -> Pairs:
    """Whether each kind of norm in the model is this formula: Gemma's adds 1 to its weight."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for norm in {type(norm): norm for norm in _norms(model)}.values():
        if norm.weight.is_meta:  # another rank has the weights; the formula does not depend on them
            norm = copy.deepcopy(norm).to_empty(device="cpu")
            nn.init.ones_(norm.weight)
        x = torch.randn(_ROWS, norm.weight.shape[0], generator=generator)
        x = x.to(norm.weight.device, norm.weight.dtype)
        pairs.append((fused(norm, x), norm(x)))
    return pairs


PATH = FastPath(
    "RMSNorm as one kernel",
    "about a seventh of a training step on a GPU, by the bytes that are read and written",
    _trial,
)
