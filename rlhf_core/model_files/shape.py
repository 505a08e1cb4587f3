"""Sizes and parameter counts of a causal language model, from its config.json. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Without a fused attention kernel in torch, so that attention keeps its (S,S) scores.
_EAGER_ONLY = {"bloom"}
_PLAIN_MLP = {"gpt2", "opt", "bloom", "gpt_neox", "gpt_bigcode", "falcon", "phi", "starcoder2"}


@dataclass(frozen=True)
class ModelShape:
    """The sizes that determine parameter count and memory.

    Attributes:
        layers, hidden, intermediate, vocabulary: as in config.json.
        heads: number of attention heads.
        query, key_value: total width of the query heads, and of the key/value heads.
        context: longest sequence in tokens; None for unbounded positions (bloom's ALiBi).
        layer_parameters: of one transformer layer.
        embedding_parameters: of token embedding, learned positions and their norm.
        head_parameters: of an untied vocabulary head, else 0.
        gated: the MLP has three matrices instead of two.
        mlp_tensors: tensors as wide as the MLP that a layer keeps for the backward pass.
        keeps_scores: attention keeps its (S,S) scores for the backward pass.
        fused_norms: its RMSNorm can be one kernel on a GPU, see rlhf_core.nn.fused_norms.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    query: int
    key_value: int
    vocabulary: int
    context: int | None
    layer_parameters: int
    embedding_parameters: int
    head_parameters: int
    gated: bool
    mlp_tensors: int
    keeps_scores: bool
    fused_norms: bool

    @property
    def parameters(self) -> int:
        """Parameters of the causal language model; a tied head counts once."""
        norm = self.hidden if self.gated else 2 * self.hidden
        body = self.layers * self.layer_parameters + norm
        return body + self.embedding_parameters + self.head_parameters

    @property
    def backbone_parameters(self) -> int:
        """Parameters of a reward model or critic: a scalar head instead of the vocabulary head."""
        return self.parameters - self.head_parameters + self.hidden + 1


def read_shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json.

    Parameter counts are exact for llama, mistral, qwen2, qwen3, gpt2, opt and bloom. Other
    architectures are treated as llama-like or gpt-like, and experts are counted in full.

    Raises:
        KeyError: the config names no hidden size, layers or heads.
    """
    fields = {**config, **config.get("text_config", {})}
    kind = str(fields.get("model_type", "llama"))
    d = int(_field(fields, "hidden_size", "n_embd", "d_model"))
    heads = int(_field(fields, "num_attention_heads", "n_head", "num_heads"))
    vocabulary = int(_field(fields, "vocab_size"))
    head_dim = int(_field(fields, "head_dim", default=d // heads))
    query = heads * head_dim
    key_value = int(_field(fields, "num_key_value_heads", default=heads)) * head_dim
    intermediate = int(_field(fields, "intermediate_size", "ffn_dim", "n_inner", default=4 * d))
    context = fields.get("max_position_embeddings") or fields.get("n_positions")
    default_tied = kind in ("gpt2", "opt", "bloom", "gemma", "gemma2")
    tied = bool(fields.get("tie_word_embeddings", default_tied))
    return ModelShape(
        layers=int(_field(fields, "num_hidden_layers", "n_layer", "num_layers")),
        hidden=d,
        intermediate=intermediate,
        heads=heads,
        query=query,
        key_value=key_value,
        vocabulary=vocabulary,
        context=int(context) if context and kind != "bloom" else None,
        layer_parameters=_layer_parameters(fields, kind, d, head_dim, query, key_value),
        embedding_parameters=_embedding_parameters(fields, kind, d, vocabulary, int(context or 0)),
        head_parameters=0 if tied else vocabulary * d,
        gated=kind not in _PLAIN_MLP,
        mlp_tensors=_mlp_tensors(fields, kind),
        keeps_scores=kind in _EAGER_ONLY,
        fused_norms=kind not in _PLAIN_MLP and not kind.startswith("gemma"),
    )


def _field(fields: Mapping[str, Any], *names: str, default: Any = None) -> Any:
    """The first of the names that config.json sets. Raises KeyError without one or a default."""
    for name in names:
        if fields.get(name) is not None:
            return fields[name]
    if default is None:
        raise KeyError(f"config.json has none of {', '.join(names)}")
    return default


def _mlp_tensors(fields: Mapping[str, Any], kind: str) -> int:
    if kind not in _PLAIN_MLP:
        return 4
    name = fields.get("activation_function", "gelu_new" if kind == "gpt2" else "")
    return 5 if name == "gelu_new" else 2  # computed step by step


def _layer_parameters(
    fields: Mapping[str, Any], kind: str, d: int, head_dim: int, query: int, key_value: int
) -> int:
    """Parameters of one transformer layer: attention, MLP, norms, biases."""
    attention = 2 * d * query + 2 * d * key_value
    f = int(_field(fields, "intermediate_size", "ffn_dim", "n_inner", default=4 * d))
    if kind in _PLAIN_MLP:
        return attention + 2 * d * f + 4 * d + (query + 2 * key_value + d) + (f + d)
    experts = int(_field(fields, "num_local_experts", "num_experts", "n_routed_experts", default=1))
    mlp = experts * 3 * d * int(_field(fields, "moe_intermediate_size", default=f))
    norms = 2 * d + (2 * head_dim if kind.startswith("qwen3") else 0)
    bias = query + 2 * key_value if kind == "qwen2" else 0
    bias += query + 2 * key_value + d if fields.get("attention_bias") else 0
    bias += 2 * f + d if fields.get("mlp_bias") else 0
    return attention + mlp + norms + bias


def _embedding_parameters(
    fields: Mapping[str, Any], kind: str, d: int, vocabulary: int, positions: int
) -> int:
    """Parameters of token embedding, learned positions and their norm or projections."""
    embedding = vocabulary * d
    if kind == "gpt2":
        return embedding + positions * d
    if kind == "bloom":
        return embedding + 2 * d
    if kind == "opt":
        embedding += (positions + 2) * d  # its positions start at 2
        width = int(fields.get("word_embed_proj_dim") or d)
        if width != d:  # the 350M model: narrow embedding, two projections, no last norm
            embedding += vocabulary * (width - d) + 2 * width * d - 2 * d
    return embedding
