"""A transformer's layers: which of them are trained, and sharing frozen ones between models."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rlhf_core.errors import ConfigError, ModelError
from rlhf_core.jobs import TrainSettings
from rlhf_core.jobs.lora import NOT_LINEAR, LayerNames, shared_with, target_problems
from rlhf_core.system.seeds import derive_seed

_PREFIXES = ("policy", "critic", "model", "backbone", "base_model", "transformer", "decoder")


def transformer_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of a model's transformer blocks.

    Raises:
        ModelError: no list of blocks of the configured length exists.
    """
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            return name, module
    raise ModelError(f"{type(model).__name__} has no list of {config.num_hidden_layers} layers.")


def layer_names(model: Any) -> LayerNames:
    """A model's layers: linear ones and the token embedding can have an adapter.

    Not those that share their weights with another layer (a tied head or embedding): merged into
    the shared weights, the adapter would change the other layer too, which it did not in training.
    """
    from transformers.pytorch_utils import Conv1D

    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if (weight := getattr(module, "weight", None)) is not None:
            owners.setdefault(id(weight), []).append(name)
    embedding = model.get_input_embeddings()
    adaptable, others = [], {}
    for name, module in model.named_modules():
        twins = [n for n in owners.get(id(getattr(module, "weight", None)), []) if n != name]
        is_embedding = module is embedding and type(module) is nn.Embedding
        if twins:
            others[name] = shared_with(twins[0])
        elif isinstance(module, (nn.Linear, Conv1D)) or is_embedding:
            adaptable.append(name)
        elif name:
            others[name] = NOT_LINEAR
    return LayerNames(adaptable, others)


def choose_trainable(model: nn.Module, settings: TrainSettings, seed: int) -> nn.Module:
    """Freeze the parameters that the settings do not train; add LoRA adapters if they say so.

    With `trainable_layers` the top n blocks, the last norm and an untied vocabulary head train
    (a tied head is the embedding, which stays frozen).

    Args:
        model: a transformers model (causal LM or backbone).

    Returns:
        The model, wrapped by peft if it has adapters.

    Raises:
        ConfigError: more trainable layers than the model has, or adapters for layers that it does
            not have or that share their weights.
    """
    if settings.lora is not None:
        if problems := target_problems(settings.lora, layer_names(model)):
            raise ConfigError(f"lora.{'. lora.'.join(problems)}.")
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(derive_seed(seed, 0x10AA))  # peft initialises with the global generator
        targets, alpha = settings.lora.targets, settings.lora.alpha
        return get_peft_model(
            model,  # type: ignore[arg-type]
            LoraConfig(
                r=settings.lora.rank,
                lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]
                target_modules=list(targets) if targets else "all-linear",
                lora_dropout=0.0,
                task_type="CAUSAL_LM" if model.get_output_embeddings() is not None else None,
            ),
        )
    count = settings.trainable_layers
    if count is None:
        return model
    name, layers = transformer_layers(model)
    if count > len(layers):
        raise ConfigError(
            f"trainable_layers is {count}, but the model has {len(layers)} layers: use at most "
            f"{len(layers)}, or leave it empty to train everything."
        )
    model.requires_grad_(False)
    for layer in list(layers)[len(layers) - count :]:
        layer.requires_grad_(True)
    parent = model.get_submodule(name.rpartition(".")[0])
    for child_name, child in parent.named_children():
        if child_name in ("norm", "ln_f", "final_layer_norm", "final_layernorm"):
            child.requires_grad_(True)
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        head.requires_grad_(True)
    return model


def share_frozen(*models: nn.Module) -> int:
    """Let equal frozen parameters of several models share memory; returns the bytes saved.

    The lower layers of policy, reference, critic and reward model are the same numbers when only
    upper layers were trained. Parameters are compared by name (less the modules' own prefixes)
    and value; trained ones are left alone.
    """
    seen: dict[str, list[nn.Parameter]] = {}
    saved = 0
    for model in models:
        for name, param in model.named_parameters():
            if param.requires_grad:
                continue
            parts = name.replace("base_layer.", "").split(".")
            while parts[0] in _PREFIXES:
                parts.pop(0)
            for other in seen.setdefault(".".join(parts), []):
                if other.data_ptr() == param.data_ptr():
                    break
                alike = other.dtype == param.dtype and other.device == param.device
                if alike and torch.equal(other, param):
                    param.data = other.data
                    saved += param.numel() * param.element_size()
                    break
            else:
                seen[".".join(parts)].append(param)
    return saved
