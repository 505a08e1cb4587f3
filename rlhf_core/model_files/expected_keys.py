"""The names of the tensors that a model needs, from its config.json alone. Imports no torch.

It knows the architectures whose parameters `shape` counts exactly. For the others, the import stage
compares the names after loading.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from rlhf_core.jobs.lora import NOT_LINEAR, LayerNames, shared_with

_LINEAR = ("weight", "bias")
_LLAMA_LAYER = (
    "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight",
    "self_attn.o_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight",
    "mlp.down_proj.weight", "input_layernorm.weight", "post_attention_layernorm.weight",
)  # fmt: skip
_GPT2_LAYER = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
_BLOOM_LAYER = (
    "input_layernorm", "self_attention.query_key_value", "self_attention.dense",
    "post_attention_layernorm", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h",
)  # fmt: skip
_OPT_LAYER = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj",
              "fc1", "fc2")  # fmt: skip
_OPT_NORMS = ("self_attn_layer_norm", "final_layer_norm")
_PREFIX = {"gpt2": "transformer.", "bloom": "transformer."}  # the others: "model."
_TIED = {"gpt2", "bloom", "opt"}  # the default if config.json does not say
_TOKEN_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings")
# Buffers that older versions saved and every loader ignores.
_LEFT_OUT = re.compile(r"(\.attn\.(masked_)?bias|\.rotary_emb\.inv_freq)$")


def compare_keys(config: Mapping[str, Any], names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Missing and unexpected tensor names, both sorted.

    Names may lack the base model's prefix, as in many folders of gpt2 and bloom. Both lists are
    empty for an unknown architecture and for quantised weights.
    """
    needed = _needed(config)
    if needed is None or config.get("quantization_config"):
        return [], []
    prefix = _PREFIX.get(str(config["model_type"]), "model.")
    have = {n if n.startswith((prefix, "lm_head.")) else prefix + n for n in names}
    missing = needed - have
    if _tied(config):
        missing.discard("lm_head.weight")
    left = {name for name in have - needed if not _LEFT_OUT.search(name)}
    return sorted(missing), sorted(left)


def layer_names(config: Mapping[str, Any], *, backbone: bool = False) -> LayerNames | None:
    """The layers that can have an adapter and those that cannot; None for unknown architectures.

    Args:
        backbone: of the model without its vocabulary head, as reward models and critics have it.
    """
    needed = _needed(config)
    if needed is None:
        return None
    prefix = _PREFIX.get(str(config["model_type"]), "model.")
    names = sorted({name.rpartition(".")[0] for name in needed})
    if backbone:
        names = [n.removeprefix(prefix) for n in names if n != "lm_head"]
    adaptable, others = [], {}
    for name in names:
        short = name.rpartition(".")[2]
        tied = not backbone and _tied(config)
        if short in (*_TOKEN_EMBEDDINGS, "lm_head") and tied:
            twin = "lm_head" if short != "lm_head" else _embedding_of(names)
            others[name] = shared_with(twin)
        elif short in ("wpe", "embed_positions") or short.startswith("ln_") or "norm" in short:
            others[name] = NOT_LINEAR
        else:
            adaptable.append(name)
    return LayerNames(adaptable, others)


def _embedding_of(names: Iterable[str]) -> str:
    return next(name for name in names if name.rpartition(".")[2] in _TOKEN_EMBEDDINGS)


def _tied(config: Mapping[str, Any]) -> bool:
    return bool(config.get("tie_word_embeddings", str(config.get("model_type")) in _TIED))


def _needed(config: Mapping[str, Any]) -> set[str] | None:
    kind = str(config.get("model_type"))
    layers = config.get("n_layer") if kind in _PREFIX else None
    layers = config.get("num_hidden_layers") if layers is None else layers
    if type(layers) is not int or not 0 < layers < 10_000:
        return None
    if kind in ("llama", "mistral", "qwen2", "qwen3"):
        outer, layer = _llama(config, kind)
        prefix, layer_prefix = "model.", "model.layers"
    elif kind in ("gpt2", "bloom"):
        parts = _GPT2_LAYER if kind == "gpt2" else _BLOOM_LAYER
        layer = _both(parts)
        outer = ["wte.weight", "wpe.weight"] if kind == "gpt2" else ["word_embeddings.weight"]
        outer += _both(["ln_f"] if kind == "gpt2" else ["ln_f", "word_embeddings_layernorm"])
        prefix, layer_prefix = "transformer.", "transformer.h"
    elif kind == "opt":
        outer, layer = _opt(config)
        prefix, layer_prefix = "model.decoder.", "model.decoder.layers"
    else:
        return None
    names = {prefix + name for name in outer} | {"lm_head.weight"}
    return names | {f"{layer_prefix}.{number}.{name}" for number in range(layers) for name in layer}


def _both(parts: Iterable[str]) -> list[str]:
    return [f"{part}.{kind}" for part in parts for kind in _LINEAR]


def _llama(config: Mapping[str, Any], kind: str) -> tuple[list[str], list[str]]:
    layer = list(_LLAMA_LAYER)
    attention = ["q_proj", "k_proj", "v_proj"]
    if kind == "qwen2":
        layer += [f"self_attn.{name}.bias" for name in attention]
    elif kind != "mistral" and config.get("attention_bias"):
        layer += [f"self_attn.{name}.bias" for name in [*attention, "o_proj"]]
    if kind == "qwen3":
        layer += ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
    if kind == "llama" and config.get("mlp_bias"):
        layer += [f"mlp.{name}.bias" for name in ("gate_proj", "up_proj", "down_proj")]
    return ["embed_tokens.weight", "norm.weight"], layer


def _opt(config: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    bias = config.get("enable_bias", True)
    norms = config.get("layer_norm_elementwise_affine", True)
    layer = [f"{part}.{kind}" for part in _OPT_LAYER for kind in _LINEAR if bias or kind != "bias"]
    layer += _both(_OPT_NORMS) if norms else []
    outer = ["embed_tokens.weight", "embed_positions.weight"]
    last = config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm")
    outer += _both(["final_layer_norm"]) if last and norms else []
    width = config.get("word_embed_proj_dim")
    if width is not None and width != config.get("hidden_size"):
        outer += ["project_in.weight", "project_out.weight"]
    return outer, layer
