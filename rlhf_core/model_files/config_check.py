"""Checks a config.json for errors that would otherwise appear on loading. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SIZES = {
    "hidden size": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "attention heads": ("num_attention_heads", "n_head", "num_heads"),
    "vocabulary": ("vocab_size",),
}
_OTHER_TASKS = ("ForMaskedLM", "Classification", "ForQuestionAnswering", "ForMultipleChoice")


def check_config(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Problems of a config.json, one text each: model type, task and sizes."""
    path = folder / "config.json"
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        return [
            f"{path} has model_type {str(kind)[:60]!r}; expected the name of an architecture, "
            "such as llama: copy the file from the source of the weights"
        ]
    problems = [
        f"{path} describes a model for another task ({name}); expected a causal language model: "
        "use one that has a language-modelling head"
        for name in _tasks(config)
    ]
    inner = config.get("text_config")
    merged = {**config, **inner} if isinstance(inner, dict) else dict(config)
    for what, names in _SIZES.items():
        name = next((n for n in names if merged.get(n) is not None), None)
        if name is not None and not _is_size(merged[name]):
            problems.append(
                f"{path} has {name} {str(merged[name])[:60]!r} for its {what}; expected a positive "
                "integer: copy the file from the source of the weights"
            )
    return problems or _check_heads(path, merged)


def _tasks(config: Mapping[str, Any]) -> list[str]:
    names = config.get("architectures")
    found = [n for n in names if isinstance(n, str)] if isinstance(names, list) else []
    other = [name[:60] for name in found if name.endswith(_OTHER_TASKS)]
    return other or (["an encoder and a decoder"] if config.get("is_encoder_decoder") else [])


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _check_heads(path: Path, config: Mapping[str, Any]) -> list[str]:
    """Whether the heads divide the hidden size, and the key/value heads the heads."""
    values = [next((config[n] for n in names if n in config), None) for names in _SIZES.values()]
    hidden, _, heads, _ = values
    if hidden and heads and not config.get("head_dim") and hidden % heads:
        return [
            f"{path} has a hidden size of {hidden} and {heads} attention heads, which do not "
            "divide it; copy the file from the source of the weights"
        ]
    groups = config.get("num_key_value_heads")
    if heads and groups is not None and (not _is_size(groups) or heads % groups):
        return [
            f"{path} has {heads} attention heads and num_key_value_heads {str(groups)[:60]}, which "
            "does not divide them; copy the file from the source of the weights"
        ]
    return []
