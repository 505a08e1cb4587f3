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
import torch.distributed as dist
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
    """Spread the module of the first rank over the mesh's ranks, layer by layer, in place.

    A layer is sent to the other ranks' devices, cut, and freed before the next one is: no device
    ever holds the whole module. What the module holds on the other ranks does not count; it may be
    on torch's device "meta".

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
            _take_from_first(layer, mesh)
            fully_shard(layer, mesh=mesh, mp_policy=precision)
        _take_from_first(root, mesh)
        fully_shard(
            root, mesh=mesh, mp_policy=precision, reshard_after_forward=None if trained else True
        )
        for name in METHODS:
            if hasattr(root, name):
                register_fsdp_forward_method(root, name)
        if not trained:  # FSDP notes the order of passes until a backward pass, which never comes
            root.register_forward_hook(lambda part, inputs, output: release(part))
    return module


@torch.no_grad()
def _take_from_first(module: nn.Module, mesh: DeviceMesh) -> None:
    """Replace parameters and buffers by the first rank's, on the device, but for sharded layers."""
    device = torch.device(mesh.device_type)
    known: dict[int, nn.Parameter] = {}  # a tied parameter stays tied

    def first_ranks(tensor: Tensor) -> Tensor:
        if mesh.get_local_rank() == 0:
            value = tensor.detach().to(device).contiguous()
        else:
            value = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        dist.broadcast(value, src=0)
        return value

    def visit(part: nn.Module) -> None:
        for name, param in part._parameters.items():
            if param is not None:
                if id(param) not in known:
                    known[id(param)] = nn.Parameter(first_ranks(param), param.requires_grad)
                part._parameters[name] = known[id(param)]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = first_ranks(buffer)
        for child in part.children():
            if not isinstance(child, FSDPModule):
                visit(child)

    visit(module)


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


def gathered_in_turn(root: nn.Module) -> Iterator[list[nn.Module]]:
    """Gather what is outside the layers, which stays, and each layer for as long as its turn lasts,
    in the precision of the root's passes. Every rank must go through all turns.

    Yields:
        The modules whose own parameters are whole, each module once.
    """
    release(root)  # what a pass has gathered may be old weights
    layers = [part for part in root.modules() if isinstance(part, FSDPModule) and part is not root]
    inside = {module for layer in layers for module in layer.modules()}  # type: ignore[attr-defined]
    try:
        root.unshard()  # type: ignore[operator]
        yield [module for module in root.modules() if module not in inside]
        for layer in layers:
            layer.unshard()
            yield list(layer.modules())  # type: ignore[attr-defined]
            layer.reshard()
    finally:
        release(root)


def gathered_bytes(root: nn.Module) -> int:
    """Bytes that `gathered` needs on each rank beside the shards."""
    half = getattr(root, "gathered_dtype", None)
    return sum(param.numel() * (half or param.dtype).itemsize for param in root.parameters())


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all of its parts, on the rank's device; every rank calls."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def assign(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Give some parameters of a module, sharded or not, other numbers; every rank calls."""
    if is_sharded(module):
        release(module)
    params = dict(module.named_parameters())
    for name, value in values.items():
        params[name].copy_(part_of(value, params[name]))


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """What this rank holds of a tensor that all ranks have, placed as another one is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(
        tensor.to(like.to_local().device), like.device_mesh, [Shard(0)], src_data_rank=None
    )
