"""Adapters of earlier stages under weights in 4 bits.

A stage publishes its 4-bit weights plus its adapter, rounded to bf16. To quantise this sum again
would undo the stage: each weight lies so near to the 4-bit value that it came from that it snaps
back to it. Of an adapter with 1 % of the weights' size, 1.5 % is left. So the adapters are kept
beside the merged weights:

    nf4/adapters.safetensors    <layer>.A (r,in), <layer>.B (out,r), fp32: B A is the layer's change

When the model is quantised again, they are taken off the weights before and are added to each
layer's output after it, frozen. What the next stage starts from is then what was published, but for
rounding.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf_core.errors import ModelError
from rlhf_core.models.nf4 import quantised_layers, was_conv1d
from rlhf_core.nn.fast_paths import patched

FOLDER = "nf4"
_FILE = "adapters.safetensors"
Factors = dict[str, tuple[Tensor, Tensor]]  # layer -> A (r,in), B (out,r)


def read_factors(folder: Path) -> Factors:
    """The adapters of a model's earlier stages; empty if it has none."""
    path = folder / FOLDER / _FILE
    if not path.exists():
        return {}
    tensors = load_file(path)
    layers = sorted({name.rpartition(".")[0] for name in tensors})
    return {layer: (tensors[f"{layer}.A"], tensors[f"{layer}.B"]) for layer in layers}


def save_factors(factors: Factors, folder: Path) -> None:
    """Write adapters beside the merged weights; nothing where there are none."""
    if not factors:
        return
    (folder / FOLDER).mkdir()
    tensors = {
        f"{layer}.{k}": v for layer, ab in factors.items() for k, v in zip("AB", ab, strict=True)
    }
    save_file(tensors, folder / FOLDER / _FILE, metadata={"format": "pt"})


def copy_factors(source: Path, folder: Path) -> None:
    """Keep the adapters of a model's earlier stages where its files are copied."""
    if (source / FOLDER).is_dir():
        shutil.copytree(source / FOLDER, folder / FOLDER)


def factors_of(model: Any) -> Factors:
    """What is added to the quantised layers of a model: earlier adapters and those that were
    trained. Empty for a model that is not quantised."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    found = ((name, _factors(*pair)) for name, *pair in quantised_layers(base))
    return {name: factors for name, factors in found if factors is not None}


def _factors(layer: Any, module: Any) -> tuple[Tensor, Tensor] | None:
    parts = [(layer.earlier_a, layer.earlier_b)] if hasattr(layer, "earlier_a") else []
    for name in getattr(module, "active_adapters", []):
        a, b = module.lora_A[name].weight, module.lora_B[name].weight
        parts.append((a.detach(), b.detach() * module.scaling[name]))
    if not parts:
        return None
    whole_a = torch.cat([a.float().cpu() for a, _ in parts])
    return whole_a, torch.cat([b.float().cpu() for _, b in parts], dim=1).contiguous()


@contextlib.contextmanager
def taken_off(factors: Factors) -> Iterator[None]:
    """Inside the block, transformers quantises weights without these adapters.

    Raises:
        ModelError: the model has no such layers, or they are not quantised.
    """
    if not factors:
        yield
        return
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize

    convert, done = Bnb4bitQuantize.convert, set()

    def convert_without(
        self: Any, input_dict: dict[str, Any], full_layer_name: Any = None, model: Any = None,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        given = {}
        for name, value in input_dict.items():
            layer = name.removesuffix(".weight")
            weight = value[0] if isinstance(value, list) else value
            if layer in factors:
                a, b = (part.to(weight.device) for part in factors[layer])
                delta = b @ a  # (out,in)
                delta = delta.t() if was_conv1d(model.get_submodule(layer)) else delta
                weight = (weight.float() - delta).to(weight.dtype)
                done.add(layer)
            given[name] = weight
        return convert(self, given, full_layer_name, model, **kwargs)

    with patched((Bnb4bitQuantize, "convert", convert_without)):
        yield
    if missing := sorted(set(factors) - done):
        raise ModelError(
            f"{FOLDER}/{_FILE} has an adapter for {missing[0]}, which is no quantised layer of the "
            "model; use the files of one stage together, as it published them."
        )


def attach(model: nn.Module, factors: Factors) -> None:
    """Add the adapters to the outputs of their layers, frozen."""
    for name, (a, b) in factors.items():
        layer: Any = model.get_submodule(name)
        device = layer.weight.device
        layer.register_buffer("earlier_a", a.to(device), persistent=False)
        layer.register_buffer("earlier_b", b.to(device), persistent=False)
        layer.register_forward_hook(_add_earlier)


def _add_earlier(layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    x, (a, b) = args[0], (layer.earlier_a, layer.earlier_b)
    return output + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)).to(output.dtype)
