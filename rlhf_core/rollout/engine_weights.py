"""Copying a policy's weights into an inference engine of the same process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_core.models.nf4 import merged_weight
from rlhf_core.nn.backbone import causal_lm


def policy_weights(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A causal LM's current weights, one by one, under their names in a checkpoint.

    LoRA adapters are merged, quantised weights are yielded whole; a tied head is yielded once.
    """
    lm = causal_lm(policy)
    with torch.no_grad():
        for name, param in lm.named_parameters():
            path, _, leaf = name.rpartition(".")
            if ".lora_" in name:
                continue
            path = path.removesuffix(".base_layer")
            whole = merged_weight(lm.get_submodule(path)) if leaf == "weight" else param.detach()
            yield f"{path}.{leaf}", whole


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
