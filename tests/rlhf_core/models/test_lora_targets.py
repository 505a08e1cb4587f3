"""Which layers can have an adapter, on five architectures; and that the stored model has them."""

import pytest
import torch
from torch import nn

from rlhf_core.errors import ConfigError
from rlhf_core.jobs import LoRA, TrainSettings
from rlhf_core.model_files import expected_keys
from rlhf_core.models.loading import load_causal_lm
from rlhf_core.models.saving import save_causal_lm
from rlhf_core.nn.layers import choose_trainable, layer_names
from tests.rlhf_core.models.test_models import ARCHITECTURES, IDS, MASK, tiny

peft = pytest.importorskip("peft")

# architecture -> its linear layers; written by hand
LINEAR = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "qwen2": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    "bloom": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
}
EMBEDDING = {"gpt2": "wte", "bloom": "word_embeddings"}  # the others: embed_tokens
EVERY = [(name, target) for name, targets in LINEAR.items() for target in sorted(targets)]
UNTIED = [(name, "lm_head") for name in ARCHITECTURES]
UNTIED += [(name, EMBEDDING.get(name, "embed_tokens")) for name in ARCHITECTURES]


def adapted(model: nn.Module, *targets: str) -> nn.Module:
    """The model with adapters that change something."""
    lora = LoRA(rank=2, alpha=4, targets=targets or None)
    model = choose_trainable(model, TrainSettings(lora=lora), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(torch.randn(param.shape, generator=generator) * 0.3)
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, attention_mask=MASK.long()).logits


@pytest.mark.parametrize(
    ("name", "tied", "target"),
    [(name, True, "") for name in ARCHITECTURES]
    + [(name, True, target) for name, target in EVERY]
    + [(name, False, target) for name, target in UNTIED],
)
def test_stored_model_is_the_trained_one_for_every_target(tmp_path, name, tied, target):
    base, out = tmp_path / "base", tmp_path / "out"
    tiny(name, tied).save_pretrained(base)
    out.mkdir()
    model = adapted(load_causal_lm(base), *([target] if target else []))
    expected = logits(model)
    assert (expected - logits(load_causal_lm(base))).abs().max() > 1e-3, "the adapter acts"
    save_causal_lm(model, out, base)
    torch.testing.assert_close(logits(load_causal_lm(out)), expected, atol=1e-5, rtol=1e-5)
    beside = peft.PeftModel.from_pretrained(load_causal_lm(base), out / "adapter").eval()
    torch.testing.assert_close(logits(beside), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backbone", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_config_alone_tells_the_layers_of_the_model(name, tied, backbone):
    model = tiny(name, tied)
    real = layer_names(model.base_model if backbone else model)
    told = expected_keys.layer_names(model.config.to_dict(), backbone=backbone)
    assert set(told.adaptable) == set(real.adaptable)
    assert told.others == {layer: real.others[layer] for layer in told.others}
    short = {layer.rpartition(".")[2] for layer in real.adaptable}
    outer = {EMBEDDING.get(name, "embed_tokens")} | (set() if backbone else {"lm_head"})
    assert short == LINEAR[name] | (set() if tied and not backbone else outer)


@pytest.mark.parametrize(
    ("name", "target", "problem"),
    [
        ("llama", "lm_head", "shares its weights with embed_tokens"),
        ("llama", "embed_tokens", "shares its weights with lm_head"),
        ("gpt2", "wte", "shares its weights with lm_head"),
        ("gpt2", "wpe", "no linear layer"),
        ("opt", "embed_positions", "no linear layer"),
        ("llama", "norm", "no linear layer"),
        ("llama", "self_attn", "no linear layer"),
        ("llama", "proj", "does not have; valid are down_proj, gate_proj, k_proj, o_proj, q_proj"),
        ("llama", "all-linear", "does not have"),
        ("llama", "query_key_value", "does not have"),
    ],
)
def test_a_target_without_a_layer_of_its_own_is_refused(name, target, problem):
    """Beside a right one, where peft itself says nothing."""
    right = sorted(LINEAR[name])[0]
    with pytest.raises(ConfigError, match=f"'{target}', which .*{problem}"):
        adapted(tiny(name), right, target)


@pytest.mark.parametrize(
    ("target", "count"),
    [("q_proj", 3), ("self_attn.q_proj", 3), ("1.self_attn.q_proj", 1),
     ("model.layers.2.mlp.up_proj", 1)],
)  # fmt: skip
def test_a_target_means_the_layers_whose_name_ends_with_it(target, count):
    model = adapted(tiny("llama"), target)
    with_adapter = {n.split(".lora_")[0] for n, _ in model.named_parameters() if ".lora_" in n}
    assert len(with_adapter) == count
    assert all(layer.endswith(f".{target}") for layer in with_adapter)
