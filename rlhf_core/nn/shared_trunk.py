"""Lower layers that several models have in common are run once for all of them.

With `trainable_layers`, policy, reference, critic and reward model come from the same SFT model and
differ in their upper layers alone. Of a micro-batch, the hidden states below the lowest layer that
differs are computed once; every model goes on from there, when it is scored and in each pass of
training. Nothing else changes: the layers that run get the same numbers in the same shapes.

    for a trunk of n of L layers and a rollout scored by four models, trained on E times by two:
    layers run forward      4 L + 2 E L    ->    n + (4 + 2 E) (L - n)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_core.nn.backbone import BareBackbone, backbone, backbone_hidden
from rlhf_core.nn.layers import transformer_layers
from rlhf_core.nn.unpadded import run_alike
from rlhf_core.nn.vocabulary_head import lm_head


class _Reached(Exception):
    """The hidden states at the end of the trunk."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class _Skip(nn.Module):
    """Stands in for a layer of the trunk: gives the trunk's end; else looks like the layer."""

    def __init__(self, layer: nn.Module, trunk: Trunk) -> None:
        super().__init__()
        # not as submodules: parameters are the model's own
        self.__dict__["layer"], self.__dict__["trunk"] = layer, trunk

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The hidden states that the trunk holds, in the form of the layer's own output."""
        hidden = self.trunk.hidden
        return (hidden,) if self.trunk.in_tuple else hidden


class _Stack:
    """The layers of one model."""

    def __init__(self, model: nn.Module, depth: int, trunk: Trunk) -> None:
        self.model = model
        name, self.whole = transformer_layers(model)
        parent, _, self.name = name.rpartition(".")
        self.parent = model.get_submodule(parent)
        skips = [_Skip(layer, trunk) for layer in list(self.whole)[:depth]]
        self.upper = nn.ModuleList([*skips, *list(self.whole)[depth:]])
        self.whole[depth].register_forward_pre_hook(trunk.at_the_end, with_kwargs=True)

    def put(self, layers: nn.ModuleList) -> None:
        self.parent._modules[self.name] = layers


class Trunk:
    """The layers that models share.

    Args:
        models: transformers models (causal LM or backbone); the first one's layers are run.
        depth: layers of the trunk, at least 1 and fewer than the models have.
    """

    def __init__(self, models: Sequence[nn.Module], depth: int) -> None:
        self.depth = depth
        self.hidden: Tensor | None = None
        self._stop = False
        self.in_tuple = _in_tuple(models[0])
        self._stacks = [_Stack(model, depth, self) for model in models]

    def at_the_end(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Hook before the first layer above the trunk."""
        if self._stop:
            raise _Reached(args[0] if args else kwargs["hidden_states"])

    @torch.no_grad()
    def run(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Hidden states (B,S,d) at the end of the trunk; input_ids, mask (B,S)."""
        self._stop = True
        try:
            _call(self._stacks[0].model, input_ids, mask)
        except _Reached as reached:
            return reached.hidden
        finally:
            self._stop = False
        raise AssertionError("the model has ended before the trunk")

    @contextlib.contextmanager
    def replaced_by(self, hidden: Tensor) -> Iterator[None]:
        """Within it, all models go on from these hidden states, whatever tokens they are given."""
        self.hidden = hidden
        for stack in self._stacks:
            stack.put(stack.upper)
        try:
            yield
        finally:
            self.hidden = None
            for stack in self._stacks:
                stack.put(stack.whole)


def find_trunk(models: Sequence[nn.Module]) -> Trunk | None:
    """The trunk of some models, or None where they have none.

    It ends before the first layer that trains or that is not the same in all; the embeddings must
    be the same too. It is tried out: with it, each model must give the same numbers as without.

    Args:
        models: transformers models (causal LM or backbone) on one device.
    """
    stacks = [list(transformer_layers(model)[1]) for model in models]
    embeddings = [model.get_input_embeddings() for model in models]  # type: ignore[operator]
    if any(p.requires_grad for p in embeddings[0].parameters()) or not _alike(embeddings):
        return None
    depth = 0
    for layers in zip(*stacks, strict=False):
        trains = any(p.requires_grad for layer in layers for p in layer.parameters())
        if trains or not _alike(layers):
            break
        depth += 1
    depth = min(depth, *(len(s) - 1 for s in stacks))
    if depth < 1:
        return None
    for model in models:  # what is found out by running a whole model is found out now
        if model.get_output_embeddings() is not None:  # type: ignore[operator]
            lm_head(model)
    run_alike([backbone(BareBackbone(model.base_model)) for model in models])  # type: ignore[arg-type]
    trunk = Trunk(models, depth)
    return trunk if _changes_nothing(trunk, models) else None


def _alike(modules: Sequence[nn.Module]) -> bool:
    """Whether all have the parameters of the first, in number, type and value."""
    first = list(modules[0].parameters())
    for other in modules[1:]:
        theirs = list(other.parameters())
        if len(theirs) != len(first):
            return False
        for a, b in zip(first, theirs, strict=True):
            if a.data_ptr() != b.data_ptr() and not (
                a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
            ):
                return False
    return True


@torch.no_grad()
def _changes_nothing(trunk: Trunk, models: Sequence[nn.Module]) -> bool:
    device = next(models[0].parameters()).device
    ids = torch.arange(3, 9, device=device).view(1, 6)
    mask = torch.ones_like(ids, dtype=torch.bool)
    hidden = trunk.run(ids, mask)
    for model in models:
        want = _call(model, ids, mask)
        with trunk.replaced_by(hidden):
            if not torch.equal(_call(model, torch.zeros_like(ids), mask), want):
                return False
    return True


def _call(model: nn.Module, input_ids: Tensor, mask: Tensor) -> Tensor:
    """The backbone's output, as in training."""
    return backbone_hidden(BareBackbone(model.base_model), input_ids, mask)  # type: ignore[arg-type]


@torch.no_grad()
def _in_tuple(model: nn.Module) -> bool:
    """Whether a layer's output is a tuple (transformers before 4.54)."""
    seen: list[bool] = []
    layer = transformer_layers(model)[1][0]
    hook = layer.register_forward_hook(lambda m, a, output: seen.append(isinstance(output, tuple)))
    try:
        ids = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
        _call(model, ids, torch.ones_like(ids, dtype=torch.bool))
    finally:
        hook.remove()
    return seen[0]
