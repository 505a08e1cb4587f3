"""Copying a policy's weights into an inference engine of the same process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_core.models.nf4 import merged_weight
from rlhf_core.nn.backbone import causal_lm
from rlhf_core.nn.modules import Policy
from rlhf_core.nn.sharded import gathered_in_turn, is_sharded
from rlhf_core.rollout.handover import read


def policy_weights(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A causal LM's current weights, one by one, under their names in a checkpoint.

    LoRA adapters are merged, quantised weights are yielded whole; a tied head is yielded once.
    Where the policy is sharded, one layer after another is gathered in the precision of its passes,
    for which all ranks must take all weights.

    Args:
        policy: the causal LM, or the `Policy` around it, which it has to be where it is sharded.
    """
    lm = causal_lm(policy.model if isinstance(policy, Policy) else policy)
    with torch.no_grad():
        if not is_sharded(policy):
            yield from _weights(lm, list(lm.modules()))
            return
        for modules in gathered_in_turn(policy):
            # An engine may load a weight after the layer has been let go.
            yield from ((name, weight.clone()) for name, weight in _weights(lm, modules))


def _weights(lm: nn.Module, modules: Sequence[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Those of some of its modules, without the modules in them."""
    wanted, seen = set(modules), set()
    for path, module in lm.named_modules():
        if module not in wanted:
            continue
        for leaf, param in module._parameters.items():
            if param is None or id(param) in seen or ".lora_" in f"{path}.{leaf}":
                continue
            seen.add(id(param))
            place = path.removesuffix(".base_layer")
            weight = merged_weight(lm.get_submodule(place)) if leaf == "weight" else param.detach()
            yield f"{place}.{leaf}".removeprefix("."), weight


def put(worker: Any, weights: Iterable[tuple[str, Tensor]]) -> tuple[set[str], set[str] | None]:
    """Load weights into an engine; runs inside it.

    Returns:
        Names of all its parameters, and of those loaded; None if the model does not report them.
    """
    model, loaded = worker.get_model(), []
    load = model.load_weights
    model.load_weights = lambda given: loaded.append(load(given)) or loaded[-1]
    try:
        # Not the model's own load_weights: the layers hold packed copies (CPU) or quantised ones
        # (GPU), which must be renewed.
        worker.reload_weights(weights_iterator=weights)
    finally:
        del model.load_weights
    for module in model.modules():
        # vLLM 0.32 on a CPU: a tied head computes with a packed copy of the embedding, and loading
        # the embedding does not renew it.
        if hasattr(module, "cpu_linear") and module.weight.numel() > 0:
            module.quant_method.process_weights_after_loading(module)
    return {name for name, _ in model.named_parameters()}, loaded[-1]


def put_from(worker: Any, path: str) -> tuple[set[str], set[str] | None]:
    """`put` of the weights in a `Handover`; runs in each of an engine's processes."""
    return put(worker, read(Path(path)))
