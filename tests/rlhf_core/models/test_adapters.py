"""The adapter beside the merged weights: plain peft on the plain base gives the merged model."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from rlhf_core.jobs import LoRA, TrainSettings
from rlhf_core.models.adapters import base_name
from rlhf_core.models.loading import load_causal_lm, load_scalar_model, new_scalar_model
from rlhf_core.models.saving import save_causal_lm, save_scalar_model
from rlhf_core.nn.layers import choose_trainable
from rlhf_core.nn.modules import ScalarModel
from tests.rlhf_core.models.test_models import IDS, MASK, tiny

pytest.importorskip("peft")
DIGEST = "ab" * 32


def trained(model, seed=1, **lora):
    """The model with an adapter that changes something."""
    model = choose_trainable(model, TrainSettings(lora=LoRA(**({"rank": 2} | lora))), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(torch.randn(param.shape, generator=generator) * 0.3)
    return model.eval()


def base_folder(tmp_path, name):
    folder = tmp_path / DIGEST
    tiny(name).save_pretrained(folder)
    return folder


def saved(model, tmp_path, source, name="out"):
    out = tmp_path / name
    out.mkdir()
    save_causal_lm(model, out, source)
    return out


@pytest.mark.parametrize("alpha", [16.0, 0.5])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_base_with_the_adapter_is_the_merged_model(tmp_path, name, alpha):
    from peft import PeftModel

    base = base_folder(tmp_path, name)
    out = saved(trained(load_causal_lm(base), alpha=alpha), tmp_path, base)
    assert sorted(p.name for p in (out / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base).eval()
        before = plain(IDS, attention_mask=MASK.long()).logits
        merged = AutoModelForCausalLM.from_pretrained(out).eval()
        expected = merged(IDS, attention_mask=MASK.long()).logits
        adapted = PeftModel.from_pretrained(plain, out / "adapter").eval()
        got = adapted(IDS, attention_mask=MASK.long()).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert (got - before).abs().max() > 1e-3, "the adapter changes something"


def test_adapter_names_its_base_and_repeats_bit_for_bit(tmp_path):
    base = base_folder(tmp_path, "llama")
    digests = []
    for name in ("a", "b"):
        out = saved(trained(load_causal_lm(base)), tmp_path, base, name) / "adapter"
        digests.append([hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.iterdir())])
    assert digests[0] == digests[1]
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"artifact:{DIGEST}"
    assert config["target_modules"] == sorted(config["target_modules"])
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (2, 16, True)
    assert str(tmp_path) not in (out / "adapter_config.json").read_text()
    assert base_name(Path("/models/llama")) is None


def test_stage_after_it_does_not_take_the_adapter_along(tmp_path):
    """It belongs to the model that its own stage started from."""
    base = base_folder(tmp_path, "llama")
    first = saved(trained(load_causal_lm(base)), tmp_path, base)
    second = saved(load_causal_lm(first), tmp_path, first, "second")
    assert (first / "adapter").is_dir() and not (second / "adapter").exists()


def test_reward_model_has_its_adapter_too(tmp_path):
    from peft import PeftModel

    base = base_folder(tmp_path, "llama")
    fresh = new_scalar_model(base, seed=1)
    model = ScalarModel(trained(fresh.backbone), fresh.head.in_features)
    model.reset_head(1)
    out = tmp_path / "out"
    out.mkdir()
    save_scalar_model(model, out, base)
    merged = load_scalar_model(out)
    adapted = load_scalar_model(out)
    plain = AutoModel.from_pretrained(base).eval()
    adapted.backbone = PeftModel.from_pretrained(plain, out / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(IDS, MASK), merged(IDS, MASK), atol=1e-5, rtol=1e-5)
