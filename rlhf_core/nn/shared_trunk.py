"""Lower layers that several models have in common run once for all of them.

With `trainable_layers`, policy, reference, critic and reward model come from the same SFT model and
differ in their upper layers only. Of a micro-batch, the hidden states below the lowest layer that
differs are computed once; every model continues from there, when it is scored and in each epoch of
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

from rlhf_core.nn import fast_paths, unpadded
from rlhf_core.nn.backbone import BareBackbone, backbone, backbone_hidden, try_out
from rlhf_core.nn.fast_paths import FastPath, Pairs, patched
from rlhf_core.nn.layers import transformer_layers
from rlhf_core.nn.padding import TokenIndex
from rlhf_core.nn.probe_model import trial_rows
from rlhf_core.nn.vocabulary_head import lm_head


class _Reached(Exception):
    """The hidden states at the end of the trunk."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class Trunk:
    """The layers that models share.

    Args:
        models: transformers models (causal LM or backbone); the first one's layers are run.
        depth: layers of the trunk, at least 1 and fewer than the models have.
    """

    def __init__(self, models: Sequence[nn.Module], depth: int) -> None:
        self.depth = depth
        self._models = list(models)
        self._in_tuple = _in_tuple(models[0])

    @torch.no_grad()
    def run(self, input_ids: Tensor, mask: Tensor, index: TokenIndex | None = None) -> Tensor:
        """Hidden states (B,S,d) at the end of the trunk; input_ids, mask (B,S)."""
        model = self._models[0]

        def stop(*args: Any, **kwargs: Any) -> Any:
            raise _Reached(args[0] if args else kwargs["hidden_states"])

        with patched((transformer_layers(model)[1][self.depth], "forward", stop)):
            try:
                _call(model, input_ids, mask, index)
            except _Reached as reached:
                return reached.hidden
        raise AssertionError("the model returned before the end of the trunk")

    @contextlib.contextmanager
    def replaced_by(self, hidden: Tensor) -> Iterator[None]:
        """Inside the block, all models continue from these hidden states, whatever their tokens."""

        def skip(*args: Any, **kwargs: Any) -> Any:
            return (hidden,) if self._in_tuple else hidden

        patches = []
        for model in self._models:
            for layer in list(transformer_layers(model)[1])[: self.depth]:
                patches.append((layer, "forward", skip))
                # there is nothing to run again in the backward pass
                patches.append((layer, "gradient_checkpointing", False))
        with patched(*patches):
            yield


def find_trunk(models: Sequence[nn.Module]) -> Trunk | None:
    """The trunk of several models, or None if they share no layers.

    It ends before the first layer that trains or that is not the same in all; the embeddings must
    be the same too. It is tried out: each model must give the same numbers with it as without.

    Args:
        models: transformers models (causal LM or backbone) on one device.
    """
    if not fast_paths.switched_on():
        return None
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
    bases = [BareBackbone(model.base_model) for model in models]  # type: ignore[arg-type]
    for model, base in zip(models, bases, strict=True):  # while they are whole
        try_out(base)
        if model.get_output_embeddings() is not None:  # type: ignore[operator]
            lm_head(model)
    unpadded.use_alike([backbone(base) for base in bases])
    trunk = Trunk(models, depth)
    return trunk if PATH.try_out(nn.ModuleList(models), trunk) else None


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


def _trial(models: nn.ModuleList, trunk: Trunk) -> Pairs:
    pairs = []
    ids, mask = trial_rows(models[0])
    hidden = trunk.run(ids, mask)
    for model in models:
        plain = _call(model, ids, mask)
        with trunk.replaced_by(hidden):
            pairs.append((_call(model, torch.zeros_like(ids), mask)[mask], plain[mask]))
    return pairs


PATH = FastPath(
    "lower layers run once for several models",
    "every model runs its lower layers itself, in each epoch",
    _trial,
)


def _call(
    model: nn.Module, input_ids: Tensor, mask: Tensor, index: TokenIndex | None = None
) -> Tensor:
    """The backbone's output, as in training."""
    bare = BareBackbone(model.base_model)  # type: ignore[arg-type]
    return backbone_hidden(bare, input_ids, mask, index=index)


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
