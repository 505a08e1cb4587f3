"""LoRA adapters as peft saves them, beside the merged weights of an artifact.

    config.json  model.safetensors ...     the merged model, which every reader opens
    adapter/adapter_config.json            the same change as an adapter of the stage's input:
    adapter/adapter_model.safetensors      peft.PeftModel.from_pretrained(base, folder / "adapter")

So a server can hold one base model and many adapters. The base of an adapter is the input of its
stage: for PPO after SFT, the merged SFT model.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

FOLDER = "adapter"


def save_adapter(model: nn.Module, folder: Path, source: Path) -> None:
    """Write the adapter of an unmerged peft model; equal adapters give equal bytes.

    peft's own `save_pretrained` writes the targets in random order, the base as a path of this
    machine, and an empty README.

    Args:
        model: a peft model, fp32 on the CPU. For any other model nothing is written.
        folder: of the artifact; the adapter is written to `adapter/` in it.
        source: folder of the adapter's base model.
    """
    if not hasattr(model, "peft_config"):
        return
    from peft import get_peft_model_state_dict

    # Whole embeddings are never trained here. To find that out, peft would contact the hub.
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    config = {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in model.peft_config["default"].to_dict().items()  # type: ignore[union-attr, index, operator]
    }
    config["base_model_name_or_path"] = base_name(source)
    config["inference_mode"] = True
    target = folder / FOLDER
    target.mkdir()
    save_file(
        {name: value.detach().contiguous() for name, value in tensors.items()},
        target / "adapter_model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    text = json.dumps(config, indent=2, sort_keys=True)
    (target / "adapter_config.json").write_text(text + "\n")


def base_name(source: Path) -> str | None:
    """`artifact:<digest>`, as in `model.source`, for a folder of the store's cache.

    None for any other folder, whose path means nothing on another machine.
    """
    return f"artifact:{source.name}" if re.fullmatch(r"[0-9a-f]{64}", source.name) else None
