"""The last layer's MLP, only where its output is read.

A reward model reads one position of each reply. No position sees another one's output of the last
layer, so there the MLP, most of the layer's arithmetic, need not be computed at the others: of a
model of 30 layers some 2.5 % of a pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_core.nn.backbone import BareBackbone, backbone_hidden
from rlhf_core.nn.probe_model import once, same_numbers
from rlhf_core.nn.unpadded import Layout


@contextlib.contextmanager
def only_at(backbone: Any, read: Tensor) -> Iterator[None]:
    """Within it, a pass over a backbone gives hidden states of use at some positions alone.

    A model whose last layer has no `mlp`, or in which that changes what is read, runs as ever. So
    does one with gradient checkpointing, whose layers run again when this has ended, and one whose
    rows go without their padding (`rlhf_core.nn.unpadded`).

    Args:
        read: (b,S) bool, of the rows that go through it.
    """
    checkpointing = getattr(backbone, "is_gradient_checkpointing", False)
    if checkpointing or not can_leave_out(backbone):
        yield
        return
    with _replaced(_mlp(backbone), read):
        yield


def _mlp(backbone: Any) -> nn.Module | None:
    from rlhf_core.nn.layers import transformer_layers

    mlp = getattr(transformer_layers(backbone)[1][-1], "mlp", None)
    return mlp if isinstance(mlp, nn.Module) and "forward" not in vars(mlp) else None


@contextlib.contextmanager
def _replaced(mlp: Any, read: Tensor) -> Iterator[None]:
    layout = Layout(read.flatten().nonzero().squeeze(1), *read.shape)
    whole = mlp.forward

    def forward(x: Tensor) -> Any:
        """(b,S,d) -> (b,S,d), zeros where it is not read; all of it for rows without padding."""
        if x.shape[:2] != read.shape:
            return whole(x)
        return layout.put(whole(layout.take(x).unsqueeze(0)).squeeze(0))

    mlp.forward = forward
    try:
        yield
    finally:
        del mlp.forward


@once
def can_leave_out(backbone: Any) -> bool:
    """Whether what is read stays the same, tried out on two rows of three tokens."""
    device, model = next(backbone.parameters()).device, BareBackbone(backbone)
    ids = torch.arange(3, 9, device=device).view(2, 3)
    read = torch.zeros_like(ids, dtype=torch.bool)
    read[0, 2] = read[1, 1] = True
    mlp = _mlp(backbone)
    if mlp is None:
        return False
    mask = torch.ones_like(ids)
    try:
        want = backbone_hidden(model, ids, mask)[read]
        with _replaced(mlp, read):
            found = backbone_hidden(model, ids, mask)[read]
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return False  # an MLP that takes or gives something else
    return same_numbers(found, want)
