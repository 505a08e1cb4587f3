"""Frozen weights in 4-bit NormalFloat (NF4), by bitsandbytes, for QLoRA (arXiv 2305.14314).

The linear layers are held in 4 bits and two levels of scales, 4.127 bits per weight; embedding,
head and norms are not quantised. Each pass multiplies with the weights as they come out of the 4
bits. These are what the adapters are trained against, and what is published with them.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_core.errors import ConfigError


@dataclass(frozen=True)
class NF4:
    """Quantise the linear layers of a model that is loaded.

    Attributes:
        device: where they are quantised, one by one, and stay: the whole model is never there in
            more bits.
        compute: dtype of the products.
    """

    device: torch.device
    compute: torch.dtype

    def options(self) -> dict[str, Any]:
        """Arguments of transformers' `from_pretrained`.

        Raises:
            ConfigError: bitsandbytes is not installed.
        """
        if find_spec("bitsandbytes") is None:
            raise ConfigError(
                "model.quantization is nf4, which needs the package bitsandbytes; run: pip install "
                "bitsandbytes"
            )
        # Its import warns of a faster kernel on a hub, which we neither have nor want.
        logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=self.compute,
        )
        return {"quantization_config": config, "device_map": {"": self.device}}


def is_quantised(model: nn.Module) -> bool:
    """Whether a model has quantised layers."""
    return any(is_nf4(module) for module in model.modules())


def quantised_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Name, layer, and the layer or the peft module around it, of each quantised layer.

    Args:
        model: not wrapped by peft as a whole.
    """
    for name, module in list(model.named_modules()):
        layer = getattr(module, "base_layer", module)
        if is_nf4(layer) and not name.endswith(".base_layer"):
            yield name, layer, module


def is_nf4(module: nn.Module) -> bool:
    """Whether a layer is quantised."""
    library = sys.modules.get("bitsandbytes")  # not imported: nothing was quantised
    return library is not None and isinstance(module, library.nn.Linear4bit)


def keep_as_loaded(model: nn.Module) -> None:
    """Have the layers keep their weights as they are.

    On a CPU with AVX512-BF16, a layer's first pass without gradients would repack its weights for
    inference: it rounds the scales to bf16, for good, and no gradient goes through it any more.
    """
    for module in model.modules():
        if is_nf4(module):
            module.support_avx512bf16_for_cpu = False


def weight_of(layer: Any) -> Tensor:
    """The weight that a layer multiplies with, adapters of earlier stages in it: (out,in), or
    (in,out) where the model's own layer was a Conv1D (gpt2). The weight itself of a layer that is
    not quantised."""
    if not is_nf4(layer):
        weight: Tensor = layer.weight
        return weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    whole = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    if hasattr(layer, "earlier_a"):  # see nf4_adapters
        whole = whole.float() + layer.earlier_b @ layer.earlier_a
    return whole.t() if was_conv1d(layer) else whole


def merged_weight(module: Any) -> Tensor:
    """`weight_of` a layer, plus its adapters in their precision (fp32) if it has some."""
    layer = getattr(module, "base_layer", module)
    weight = weight_of(layer)
    for adapter in getattr(module, "active_adapters", []):
        delta = module.get_delta_weight(adapter)
        weight = weight + (delta.t() if is_nf4(layer) and was_conv1d(layer) else delta)
    return weight


def was_conv1d(layer: Any) -> bool:
    """Whether a quantised layer stands for a Conv1D, whose weight is (in,out)."""
    return getattr(layer, "source_cls", nn.Linear) is not nn.Linear


def dequantised(model: nn.Module) -> nn.Module:
    """The model with plain fp32 layers in place of its quantised ones, adapters of these merged.

    It is changed in place. Adapters of layers that were not quantised stay.
    """
    for name, layer, module in quantised_layers(model):
        model.set_submodule(name, _plain(layer, merged_weight(module).float()))
    for module in model.modules():
        if getattr(module, "is_loaded_in_4bit", False):
            _forget_quantisation(module)
    return model


def _plain(layer: Any, weight: Tensor) -> nn.Module:
    with torch.device("meta"):
        plain: Any = (
            layer.source_cls(layer.out_features, layer.in_features)
            if was_conv1d(layer)
            else nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        )
    plain.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().float(), requires_grad=False)
    return plain  # type: ignore[no-any-return]


def _forget_quantisation(model: Any) -> None:
    """So that transformers saves and casts it like any other model."""
    model.is_loaded_in_4bit = model.is_quantized = False
    model.hf_quantizer = model.quantization_method = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
