"""Loading, freezing, adapters, scalar heads and sharing, on tiny models of five architectures."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_core.errors import ConfigError, ModelError
from rlhf_core.jobs import LoRA, TrainSettings
from rlhf_core.model_files.cutting import cut
from rlhf_core.models.loading import load_causal_lm, load_scalar_model, new_scalar_model
from rlhf_core.models.saving import (
    merged,
    save_causal_lm,
    save_in_files,
    save_scalar_model,
    stop_tokens,
)
from rlhf_core.nn.layers import choose_trainable, share_frozen
from rlhf_core.nn.modules import ActorCritic, Policy

ARCHITECTURES = ("llama", "qwen2", "gpt2", "opt", "bloom")


def tiny(name: str, tied: bool = True):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "llama": {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2,
                  "num_key_value_heads": 2},
        "qwen2": {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2,
                  "num_key_value_heads": 2},
        "gpt2": {"n_embd": 16, "n_head": 2},
        "opt": {"hidden_size": 16, "ffn_dim": 32, "num_attention_heads": 2,
                "word_embed_proj_dim": 16},
        "bloom": {"hidden_size": 16, "n_head": 2},
    }[name]  # fmt: skip
    layers = {"gpt2": "n_layer", "bloom": "n_layer"}.get(name, "num_hidden_layers")
    config = AutoConfig.for_model(
        name, vocab_size=40, tie_word_embeddings=tied, eos_token_id=1, bos_token_id=0,
        pad_token_id=0, **{layers: 3}, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture(params=ARCHITECTURES)
def folder(request, tmp_path):
    tiny(request.param).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def llama(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    return tmp_path


IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 0]])
MASK = torch.tensor([[True] * 4, [True, True, True, False]])


def test_scores_ignore_padding_and_survive_saving(folder, tmp_path):
    model = new_scalar_model(folder, seed=1)
    model.mean, model.std, model.pooling = 0.5, 2.0, "mean"
    with torch.no_grad():
        scores = model(IDS, MASK)
        alone = model(IDS[1:, :3], MASK[1:, :3])
    torch.testing.assert_close(scores[1:], alone)
    out = tmp_path / "reward"
    out.mkdir()
    save_scalar_model(model, out, folder)
    again = load_scalar_model(out)
    with torch.no_grad():
        torch.testing.assert_close(again(IDS, MASK), scores, rtol=0, atol=0)


def test_score_is_the_heads_value_at_the_last_real_token(llama):
    model = new_scalar_model(llama, seed=1)
    causal = load_causal_lm(llama)
    with torch.no_grad():
        hidden = causal(input_ids=IDS[:1], output_hidden_states=True).hidden_states[-1][0, -1]
        expected = hidden @ model.head.weight[0] + model.head.bias[0]
        torch.testing.assert_close(model(IDS, MASK)[0], expected)


@pytest.mark.parametrize("left", (False, True))
def test_mean_pooling_reads_all_tokens_so_far_and_no_padding(llama, left):
    model = new_scalar_model(llama, seed=1)
    model.pooling = "mean"
    causal = load_causal_lm(llama)
    with torch.no_grad():
        hidden = causal(input_ids=IDS[1:, :3], output_hidden_states=True).hidden_states[-1][0]
        expected = hidden.mean(dim=0) @ model.head.weight[0] + model.head.bias[0]
        ids, mask = (IDS[1:].roll(1, 1), MASK[1:].roll(1, 1)) if left else (IDS[1:], MASK[1:])
        torch.testing.assert_close(model(ids, mask)[0], expected)
        first_two = hidden[:2].mean(dim=0) @ model.head.weight[0] + model.head.bias[0]
        torch.testing.assert_close(model.per_token(ids, mask)[0, 2 if left else 1], first_two)


def test_head_is_initialised_as_the_paper_says(llama):
    model = new_scalar_model(llama, seed=1)
    other = new_scalar_model(llama, seed=2)
    assert model.head.bias.abs().sum() == 0
    assert not torch.equal(model.head.weight, other.head.weight)
    wide = torch.nn.Linear(4096, 1)
    model.head = wide
    model.reset_head(0)
    assert abs(float(wide.weight.std()) - (4097) ** -0.5) < 1e-3


def test_values_belong_to_the_state_before_each_token(llama):
    module = ActorCritic(Policy(load_causal_lm(llama)), new_scalar_model(llama, seed=1))
    loss_mask = torch.tensor([[False, False, True, True], [False, True, True, False]])
    with torch.no_grad():
        _, values, _ = module(IDS, MASK, loss_mask)
        states = module.critic.per_token(IDS, MASK)
    torch.testing.assert_close(values[0], torch.stack([states[0, 0] * 0, states[0, 0] * 0,
                                                       states[0, 1], states[0, 2]]))  # fmt: skip
    torch.testing.assert_close(values[1, 1:3], states[1, 0:2])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_trainable_layers_are_the_top_ones_and_the_last_norm(name):
    model = choose_trainable(tiny(name), TrainSettings(trainable_layers=1), 0)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    blocks = {n for n in trained if ".2." in n}
    assert blocks, trained
    rest = trained - blocks
    assert rest and all(("norm" in n or "ln_f" in n) and "layers" not in n for n in rest), rest


def test_an_untied_head_trains_with_the_top_layers():
    model = choose_trainable(tiny("llama", tied=False), TrainSettings(trainable_layers=1), 0)
    assert model.lm_head.weight.requires_grad
    assert not model.model.embed_tokens.weight.requires_grad


def test_more_trainable_layers_than_the_model_has_is_refused():
    with pytest.raises(ConfigError, match=r"trainable_layers is 4.*has 3 layers"):
        choose_trainable(tiny("llama"), TrainSettings(trainable_layers=4), 0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_the_top_layer_changes_one_file_of_the_folder(name, tmp_path, monkeypatch):
    def small_files(sizes):
        return cut(sizes, smallest=1)

    monkeypatch.setattr("rlhf_core.models.saving.cut", small_files)
    before, after = tmp_path / "before", tmp_path / "after"
    tiny(name).save_pretrained(tmp_path)
    model = load_causal_lm(tmp_path)
    save_in_files(model, before)
    choose_trainable(model, TrainSettings(trainable_layers=1), 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0 if parameter.requires_grad else 0.0
    save_in_files(model, after)

    files = {path.name for path in before.glob("*.safetensors")}
    assert files == {path.name for path in after.glob("*.safetensors")} and len(files) > 3
    changed = {n for n in files if (before / n).read_bytes() != (after / n).read_bytes()}
    where = json.loads((after / "model.safetensors.index.json").read_text())["weight_map"]
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert changed and not changed & {where[n] for n in frozen}
    again = load_causal_lm(after).state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(again[key], value, rtol=0, atol=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lora_trains_adapters_only_and_merges_into_plain_weights(name, tmp_path):
    base = tiny(name)
    base.save_pretrained(tmp_path / "base")
    model = choose_trainable(
        load_causal_lm(tmp_path / "base"), TrainSettings(lora=LoRA(rank=2, alpha=4)), 0
    )
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in n for n in trained)
    for n, p in model.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.2)
    loss_mask = MASK.clone()
    loss_mask[:, 0] = False
    with torch.no_grad():
        adapted = Policy(model)(IDS, MASK, loss_mask)
        plain = Policy(load_causal_lm(tmp_path / "base"))(IDS, MASK, loss_mask)
    assert (adapted - plain).abs().max() > 1e-3, "the adapters take part"
    out = tmp_path / "merged"
    out.mkdir()
    save_causal_lm(merged(model), out, tmp_path / "base")
    with torch.no_grad():
        again = Policy(load_causal_lm(out))(IDS, MASK, loss_mask)
    torch.testing.assert_close(again, adapted, atol=1e-5, rtol=1e-5)


def test_frozen_equal_weights_share_memory_and_trained_ones_do_not(llama):
    policy = choose_trainable(load_causal_lm(llama), TrainSettings(trainable_layers=1), 0)
    reference = load_causal_lm(llama).requires_grad_(False)
    saved = share_frozen(policy, reference)
    low, ref_low = policy.model.layers[0], reference.model.layers[0]
    top, ref_top = policy.model.layers[2], reference.model.layers[2]
    assert low.mlp.up_proj.weight.data_ptr() == ref_low.mlp.up_proj.weight.data_ptr()
    assert top.mlp.up_proj.weight.data_ptr() != ref_top.mlp.up_proj.weight.data_ptr()
    frozen = [p for p in policy.parameters() if not p.requires_grad]
    assert saved == sum(p.numel() * 4 for p in frozen)


def test_frozen_weights_that_differ_are_not_shared(llama):
    policy = load_causal_lm(llama).requires_grad_(False)
    other = load_causal_lm(llama).requires_grad_(False)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.add_(1)
    share_frozen(policy, other)
    difference = (
        other.model.layers[0].mlp.up_proj.weight - policy.model.layers[0].mlp.up_proj.weight
    )
    torch.testing.assert_close(difference, torch.ones_like(difference))


def test_layers_of_one_model_are_not_taken_for_each_other(llama):
    model = load_causal_lm(llama).requires_grad_(False)
    before = {n: p.clone() for n, p in model.named_parameters()}
    share_frozen(model, load_causal_lm(llama).requires_grad_(False))
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]), name


def test_missing_and_unexpected_keys_are_named(llama):
    path = llama / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.9.oddity"] = weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj") as caught:
        load_causal_lm(llama)
    assert "oddity" in str(caught.value)


def test_a_plain_model_is_not_taken_for_a_reward_model(llama):
    with pytest.raises(ModelError, match="not a reward model"):
        load_scalar_model(llama)


def test_stop_tokens_come_from_the_generation_config(llama):
    assert stop_tokens(llama) == {1}
    config = json.loads((llama / "generation_config.json").read_text())
    (llama / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [1, 2]}))
    assert stop_tokens(llama) == {1, 2}
    (llama / "generation_config.json").write_text("{}")
    with pytest.raises(ModelError, match="end-of-turn"):
        stop_tokens(llama)


def test_dropout_is_off_in_every_loaded_model(folder):
    model = load_causal_lm(folder).train()
    loss_mask = MASK.clone()
    loss_mask[:, 0] = False
    with torch.no_grad():
        first = Policy(model)(IDS, MASK, loss_mask)
        second = Policy(model)(IDS, MASK, loss_mask)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
