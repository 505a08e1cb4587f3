"""Loading models from Hugging Face folders, with a check of every key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from rlhf_core.errors import ModelError
from rlhf_core.model_files.folder_check import REWARD_HEAD
from rlhf_core.model_files.remote_code import is_trusted
from rlhf_core.models.nf4 import NF4, keep_as_loaded
from rlhf_core.models.nf4_adapters import attach, read_factors, taken_off
from rlhf_core.nn import fused_norms
from rlhf_core.nn.modules import ScalarModel

REWARD_SCALE = "reward.json"


def load_causal_lm(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    nf4: NF4 | None = None,
    empty: bool = False,
) -> nn.Module:
    """A causal LM from a Hugging Face folder, dropout off, on the CPU.

    Args:
        nf4: quantise its linear layers; the model is then on the device that it says.
        empty: without its weights, which another rank has (on torch's device "meta").

    Raises:
        ModelError: weights are missing, unexpected or unreadable; each key is named.
    """
    return _load(AutoModelForCausalLM, folder, dtype, nf4, empty)


def _load(auto: Any, folder: Path, dtype: torch.dtype, nf4: NF4 | None, empty: bool) -> nn.Module:
    options = {"dtype": dtype, "trust_remote_code": is_trusted(Path(folder))}
    if empty:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=is_trusted(Path(folder)))
        with torch.device("meta"):
            return _as_trained(auto.from_config(config, **options))
    options |= {} if nf4 is None else nf4.options()
    earlier = {} if nf4 is None else read_factors(Path(folder))
    try:
        with taken_off(earlier):
            model, info = auto.from_pretrained(folder, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"The model in {folder} cannot be loaded: {error}") from error
    problems = {
        kind: sorted(str(k) for k in info.get(kind) or [])
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    if any(problems.values()):
        shown = "; ".join(
            f"{len(keys)} {kind.replace('_', ' ')}: {', '.join(keys[:5])}"
            for kind, keys in problems.items()
            if keys
        )
        raise ModelError(
            f"The weights in {folder} do not fit its config.json: {shown}. Use the files as the "
            "model's authors saved them."
        )
    attach(model, earlier)
    return _as_trained(model)


def _as_trained(model: Any) -> nn.Module:
    disable_dropout(model)
    fused_norms.install(model)
    keep_as_loaded(model)
    model.config.use_cache = False
    evaluated: nn.Module = model.eval()
    return evaluated


def new_scalar_model(
    folder: Path,
    seed: int,
    dtype: torch.dtype = torch.float32,
    nf4: NF4 | None = None,
    empty: bool = False,
) -> ScalarModel:
    """A reward model with the backbone of a causal LM and a new random head in fp32."""
    causal = load_causal_lm(folder, dtype, nf4, empty)
    size = causal.get_output_embeddings().weight.shape[1]
    model = ScalarModel(causal.base_model, size)
    model.backbone.is_loaded_in_4bit = nf4 is not None  # as of a model that is loaded alone
    model.reset_head(seed)
    return model.eval()


def load_scalar_model(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    nf4: NF4 | None = None,
    empty: bool = False,
) -> ScalarModel:
    """A reward model as `save_scalar_model` wrote it.

    Args:
        nf4: quantise the linear layers of its backbone, on the device that it says. The head stays
            on the CPU, in fp32.
        empty: without the backbone's weights, as in `load_causal_lm`.

    Raises:
        ModelError: the folder is not a reward model, or its weights do not fit.
    """
    if not (folder / REWARD_HEAD).exists():
        raise ModelError(
            f"{folder} has no {REWARD_HEAD}: it is not a reward model of this project. Use the "
            "artifact of a reward stage."
        )
    backbone = _load(AutoModel, folder, dtype, nf4, empty)
    head = load_file(folder / REWARD_HEAD)
    model = ScalarModel(backbone, head["weight"].shape[1])
    model.head.load_state_dict(head)
    scale = json.loads((folder / REWARD_SCALE).read_text())
    model.mean, model.std = float(scale["mean"]), float(scale["std"])
    model.pooling = str(scale["pooling"])
    if nf4 is None:
        model.head.to(dtype)
    return model.eval()


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, so that train and eval mode compute the same."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
