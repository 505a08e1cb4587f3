"""Saving models as Hugging Face folders of safetensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import modeling_utils

from rlhf_core.errors import ModelError
from rlhf_core.model_files.cutting import cut
from rlhf_core.model_files.folder_check import REWARD_HEAD
from rlhf_core.models.adapters import save_adapter
from rlhf_core.models.loading import REWARD_SCALE
from rlhf_core.models.nf4 import dequantised, is_quantised
from rlhf_core.models.nf4_adapters import factors_of, save_factors
from rlhf_core.nn.modules import ScalarModel

_WEIGHTS = ("model.safetensors", "pytorch_model", "adapter_model", REWARD_HEAD)


def export(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """The module in fp32 on the CPU, with the given (master) weights. Rank 0, at the end."""
    module = module.to("cpu").float()
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)
    return module


def merged(model: nn.Module) -> nn.Module:
    """The model with its LoRA adapters merged into the weights; itself if it has none.

    Of quantised layers, the weights that the adapters were trained against. The sum is computed in
    fp32, and the whole model rounded once to bf16.
    """
    quantised = is_quantised(model)
    if quantised:
        model = dequantised(model)
    merge = getattr(model, "merge_and_unload", None)
    whole: nn.Module = merge() if callable(merge) else model
    return whole.to(torch.bfloat16) if quantised else whole


def save_causal_lm(model: nn.Module, folder: Path, source: Path) -> None:
    """Write a Hugging Face folder: safetensors, config, and the tokenizer files of `source`.

    LoRA adapters are merged into the weights, and also saved beside them as adapters of `source`;
    those of quantised layers together with all earlier ones, see `nf4_adapters`.
    """
    save_adapter(model, folder, source)
    save_factors(factors_of(model), folder)
    model = merged(model)
    model.config.use_cache = True  # type: ignore[union-attr]
    save_in_files(model, folder)
    copy_companions(source, folder)


def save_in_files(model: Any, folder: Path) -> None:
    """`save_pretrained` of a transformers model, with the weights in the files of `cut`.

    It has no argument for that, so its own function is replaced meanwhile.
    """
    own = modeling_utils.split_torch_state_dict_into_shards
    modeling_utils.split_torch_state_dict_into_shards = _split
    try:
        model.save_pretrained(folder)
    finally:
        modeling_utils.split_torch_state_dict_into_shards = own


def _split(state: dict[str, Tensor], filename_pattern: str, **_: Any) -> StateDictSplit:
    """In place of the function that fills files up to a size in bytes."""
    files = cut({name: tensor.numel() for name, tensor in state.items()})
    count = len(files)
    suffixes = [f"-{n:05d}-of-{count:05d}" for n in range(1, count + 1)] if count > 1 else [""]
    names = [filename_pattern.format(suffix=suffix) for suffix in suffixes]
    return StateDictSplit(
        metadata={"total_size": sum(tensor.nbytes for tensor in state.values())},
        filename_to_tensors=dict(zip(names, files, strict=True)),
        tensor_to_filename={t: name for name, ts in zip(names, files, strict=True) for t in ts},
    )


def save_scalar_model(model: ScalarModel, folder: Path, source: Path) -> None:
    """Write a reward model: backbone, head, and the score's mean and standard deviation."""
    save_adapter(model.backbone, folder, source)
    save_factors(factors_of(model.backbone), folder)
    backbone = merged(model.backbone)
    save_in_files(backbone, folder)
    head = {k: v.detach().float().contiguous() for k, v in model.head.state_dict().items()}
    save_file(head, folder / REWARD_HEAD)
    scale = {"mean": model.mean, "std": model.std, "pooling": model.pooling}
    (folder / REWARD_SCALE).write_text(json.dumps(scale) + "\n")
    copy_companions(source, folder)


def copy_companions(source: Path, folder: Path) -> None:
    """Copy tokenizer, chat template and generation config: all but weights and existing files."""
    for path in sorted(source.iterdir()):
        skip = path.name.startswith(_WEIGHTS) or path.suffix in (".safetensors", ".jsonl")
        if path.is_file() and not skip and not path.name.endswith(".index.json"):
            target = folder / path.name
            if path.name == "generation_config.json" or not target.exists():
                shutil.copy(path, target)


def stop_tokens(folder: Path) -> set[int]:
    """Token ids that end an assistant's turn, from generation_config.json.

    Raises:
        ModelError: the model has none, so that replies would never end.
    """
    path = folder / "generation_config.json"
    eos = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
    if eos is None:
        raise ModelError(
            f"{folder} names no eos_token_id in generation_config.json, so its replies would never "
            "end. Import the model with a chat template that has an end-of-turn token."
        )
    return set(eos) if isinstance(eos, list) else {int(eos)}
