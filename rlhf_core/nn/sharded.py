"""Modules whose parameters are spread over the ranks by torch's FSDP2 (`fully_shard`).

A *root* is a `Policy` or a `ScalarModel`. Between two passes each rank holds 1/n of every
parameter. A forward pass of the root gathers what is not in a layer (embeddings, last norm, head),
and each transformer layer while it runs. So whatever reads a parameter must run as a forward pass
of its root (`Policy.within`), and all ranks must run the same layers equally often: a rank that
ran one pass less would leave the others waiting.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from rlhf_core.nn.layers import transformer_layers
from rlhf_core.nn.modules import Policy, ScalarModel

METHODS = ("within", "per_token", "states")  # of a root, called beside `forward`


def roots_of(module: nn.Module) -> list[nn.Module]:
    """The policies and scalar models in a module; itself where there are none."""
    found = [m for m in module.modules() if isinstance(m, (Policy, ScalarModel))]
    return found or [module]


def shard(
    module: nn.Module, mesh: DeviceMesh, half: torch.dtype | None, *, trained: bool
) -> nn.Module:
    """Spread a module's parameters over the mesh's ranks, layer by layer, in place.

    A layer is moved to the mesh's device, cut, and freed before the next one is: the device never
    holds the whole module.

    Args:
        half: what parameters are gathered in; gradients are summed in fp32. None: as they are.
        trained: parameters outside the layers stay gathered from a forward pass to its backward
            pass. False: there is none.
    """
    precision = MixedPrecisionPolicy(
        param_dtype=half, reduce_dtype=None if half is None else torch.float32
    )
    for root in roots_of(module):
        root.gathered_dtype = half  # type: ignore[assignment]
        model = _transformer(root)
        for layer in [] if model is None else transformer_layers(model)[1]:
            fully_shard(layer, mesh=mesh, mp_policy=precision)
        fully_shard(
            root, mesh=mesh, mp_policy=precision, reshard_after_forward=None if trained else True
        )
        for name in METHODS:
            if hasattr(root, name):
                register_fsdp_forward_method(root, name)
    return module


def _transformer(root: nn.Module) -> Any:
    """The transformers model in a root; None in a module of another kind."""
    return getattr(root, "model", None) or getattr(root, "backbone", None)


def is_sharded(module: nn.Module) -> bool:
    """Whether a root was sharded."""
    return isinstance(module, FSDPModule)


def release(module: nn.Module) -> None:
    """Free all gathered parameters; the next pass gathers them anew. Not within a pass."""
    for root in roots_of(module):
        forget = getattr(root, "reset_iter_state", None)
        if callable(forget):  # torch 2.12: also the order of passes, which would grow for ever
            with contextlib.suppress(RuntimeError, AttributeError):  # there was no pass yet
                forget()
        for part in root.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


@contextlib.contextmanager
def gathered(root: nn.Module) -> Iterator[None]:
    """Inside the block the root's parameters are whole on every rank, in the precision of its
    passes, and passes exchange nothing: ranks may run different numbers of them."""
    parts = [part for part in root.modules() if isinstance(part, FSDPModule)]
    inner = [part for part in parts if part is not root]
    for part in inner:
        part.set_reshard_after_forward(False, recurse=False)
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in inner:
            part.set_reshard_after_forward(True, recurse=False)
        release(root)


def gathered_bytes(root: nn.Module) -> int:
    """Bytes that `gathered` needs on each rank beside the shards."""
    half = getattr(root, "gathered_dtype", None)
    return sum(param.numel() * (half or param.dtype).itemsize for param in root.parameters())


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all of its parts, on the rank's device; every rank calls."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """What this rank holds of a tensor that all ranks have, placed as another one is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(
        tensor.to(like.to_local().device), like.device_mesh, [Shard(0)], src_data_rank=None
    )
