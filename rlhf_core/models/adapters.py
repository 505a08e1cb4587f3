"""LoRA adapters as peft saves them, beside the merged weights of an artifact.

    config.json  model.safetensors ...     the merged model, which every reader opens
    adapter/adapter_config.json            the same change as an adapter of the stage's own input:
    adapter/adapter_model.safetensors      peft.PeftModel.from_pretrained(base, folder / "adapter")

So a server can hold one base and many adapters. An adapter belongs to the model that its stage
started from: after SFT, PPO's adapter is one of the merged SFT model.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

FOLDER = "adapter"


def save_adapter(model: nn.Module, folder: Path, source: Path) -> None:
    """Write the adapter of a peft model that is not merged yet; equal adapters give equal bytes.

    peft's own `save_pretrained` writes its targets in no order, the base as a path of this
    machine, and a README with nothing in it.

    Args:
        model: a peft model, fp32 on the CPU. Any other has no adapter, and nothing is written.
        folder: of the artifact; the adapter goes into `adapter/` below it.
        source: folder of the model that the adapter changes.
    """
    if not hasattr(model, "peft_config"):
        return
    from peft import get_peft_model_state_dict

    # Whole embeddings are never trained here; asked to find out, peft would ask the hub.
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
    """What `model.source` calls the model in a folder of the store's cache: `artifact:<digest>`.

    None for any other folder: its path says nothing on another machine.
    """
    return f"artifact:{source.name}" if re.fullmatch(r"[0-9a-f]{64}", source.name) else None
