"""Models in 4 bits: what they multiply with is what is published; no fast path changes it."""

import shutil

import pytest
import torch
from torch import nn

from rlhf_core.errors import ConfigError, ModelError
from rlhf_core.jobs import LoRA, TrainSettings
from rlhf_core.models import nf4
from rlhf_core.models.loading import load_causal_lm, load_scalar_model, new_scalar_model
from rlhf_core.models.nf4 import NF4, dequantised, is_quantised
from rlhf_core.models.nf4_adapters import save_factors
from rlhf_core.models.saving import merged, save_causal_lm, save_scalar_model
from rlhf_core.nn.fast_paths import switched
from rlhf_core.nn.layers import choose_trainable, share_frozen
from rlhf_core.nn.modules import Policy, ScalarModel
from rlhf_core.nn.small_batch_linear import installed
from rlhf_core.nn.vocabulary_head import lm_head
from rlhf_core.rollout.engine_weights import policy_weights
from rlhf_core.rollout.generate import generate
from rlhf_core.rollout.sampling import make_row_seeds
from tests.rlhf_core.models.test_models import ARCHITECTURES
from tests.rlhf_core.tiny_models import copy_of

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")

FP32 = NF4(torch.device("cpu"), torch.float32)
LENGTHS = torch.tensor([9, 4, 7])
MASK = torch.arange(9) < LENGTHS.unsqueeze(1)
IDS = torch.randint(3, 900, (3, 9), generator=torch.Generator().manual_seed(3)) * MASK


@pytest.fixture
def folder(tmp_path):
    return copy_of("llama", tmp_path / "model")


def adapted(model: nn.Module, seed: int = 1, scale: float = 0.05, **lora) -> nn.Module:
    """The model with adapters that change something."""
    model = choose_trainable(model, TrainSettings(lora=LoRA(rank=2, **lora)), 0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                assert param.dtype == torch.float32
                param.add_(torch.randn(param.shape, generator=generator) * scale)
    return model.eval()


def logprobs(model: nn.Module, fast: bool = True) -> torch.Tensor:
    loss_mask = MASK.clone()
    loss_mask[:, 0] = False
    with switched(fast):
        return Policy(model)(IDS, MASK, loss_mask)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_plain_layers_compute_what_quantised_ones_with_adapters_did(tmp_path, name):
    """gpt2's linear layers are Conv1D, whose weights are the other way round."""
    place = copy_of(name, tmp_path / "model")
    model = adapted(load_causal_lm(place, nf4=FP32))
    expected = logprobs(model).detach()
    assert (expected - logprobs(load_causal_lm(place))).abs().max() > 0.1
    lost = (logprobs(load_causal_lm(place, nf4=FP32)) - logprobs(load_causal_lm(place))).abs()
    assert 1e-4 < lost.max() < 0.2, "4 bits are close to the weights, but not they"
    weights = dict(policy_weights(model))
    kinds = [type(layer) for layer in load_causal_lm(place).modules()]
    plain = dequantised(model).merge_and_unload()
    assert [type(layer) for layer in plain.modules()] == kinds and not is_quantised(plain)
    torch.testing.assert_close(logprobs(plain), expected, atol=1e-5, rtol=1e-5)
    # An engine gets the same weights under the same names.
    own = dict(plain.named_parameters())
    assert own.keys() == weights.keys()
    for key, value in weights.items():
        torch.testing.assert_close(value.float(), own[key], atol=1e-6, rtol=1e-6)


def test_merged_model_is_rounded_once_to_bf16(folder):
    model = adapted(load_causal_lm(folder, nf4=FP32), targets=("up_proj",))
    expected = {name: value.bfloat16() for name, value in policy_weights(model)}
    whole = merged(model)
    assert all(torch.equal(value, expected[name]) for name, value in whole.named_parameters())
    whole.to(torch.float32)  # like any other model


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_scoring_leaves_weights_and_gradients_as_they_are(folder, kind):
    """bitsandbytes repacks the weights of a CPU with AVX512-BF16 for inference."""
    model = adapted(load_causal_lm(folder, kind, NF4(torch.device("cpu"), kind)))
    before = {name: value.clone() for name, value in policy_weights(model)}
    with torch.no_grad():
        first = logprobs(model)
    assert all(torch.equal(value, before[name]) for name, value in policy_weights(model))
    logprobs(model).sum().backward()
    trained = [param for param in model.parameters() if param.requires_grad]
    assert all(param.grad is not None and param.grad.any() for param in trained)
    with torch.no_grad():
        assert torch.equal(logprobs(model), first)


def test_fast_paths_change_nothing(folder):
    """Rows without padding, the vocabulary head, few rows the other way round, decoding."""
    model = adapted(load_causal_lm(folder, nf4=FP32))
    torch.testing.assert_close(logprobs(model), logprobs(model, False), atol=1e-5, rtol=1e-5)
    assert lm_head(model) is not None, "the head is not quantised"
    with torch.no_grad(), installed(model):
        patched = [name for name, m in model.named_modules() if "forward" in vars(m)]
        assert patched and not any(name.endswith("base_layer") for name in patched)
        few = model(input_ids=IDS, attention_mask=MASK.long()).logits
    with torch.no_grad():
        plain = model(input_ids=IDS, attention_mask=MASK.long()).logits
    torch.testing.assert_close(few, plain, atol=1e-5, rtol=1e-5)
    prompts = [row[mask].tolist() for row, mask in zip(IDS, MASK, strict=True)] * 2
    replies = []
    for fast in (True, False):
        with switched(fast):
            options = {"max_new_tokens": 6, "eos_ids": {2}, "pad_id": 0}
            rollout = generate(
                model, prompts, row_seeds=make_row_seeds(0, 0, [*range(6)]), **options
            )
            replies.append(rollout.response_ids)
    assert torch.equal(*replies)


def test_equal_models_share_their_codes_and_different_ones_do_not(folder):
    first, second = (load_causal_lm(folder, nf4=FP32).requires_grad_(False) for _ in range(2))
    expected = logprobs(first)
    codes = first.model.layers[0].mlp.up_proj.weight
    assert share_frozen(first, second) > codes.numel()
    assert second.model.layers[0].mlp.up_proj.weight.data_ptr() == codes.data_ptr()
    assert torch.equal(logprobs(second), expected) and torch.equal(logprobs(first), expected)
    # Twice the weights have the same codes: only their scales differ.
    twice = load_causal_lm(folder)
    with torch.no_grad():
        twice.model.layers[0].mlp.up_proj.weight.mul_(2)
    twice.save_pretrained(folder)
    other = load_causal_lm(folder, nf4=FP32).requires_grad_(False)
    expected = logprobs(other)
    share_frozen(first, other)
    assert torch.equal(logprobs(other), expected)


def test_reward_model_is_quantised_but_for_its_head(folder):
    model = new_scalar_model(folder, 0, torch.bfloat16, NF4(torch.device("cpu"), torch.bfloat16))
    assert is_quantised(model.backbone)
    assert model.head.weight.dtype == torch.float32
    model = ScalarModel(adapted(model.backbone), model.head.in_features)
    kinds = {type(m).__module__ for m in model.modules() if hasattr(m, "lora_A")}
    assert kinds == {"peft.tuners.lora.bnb"}


def test_weights_that_do_not_fit_are_named_too(folder):
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.9.oddity"] = weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 missing keys: model\.layers\.0\.mlp\.up_proj\.weight"):
        load_causal_lm(folder, nf4=FP32)


def test_missing_package_is_named_with_its_install_line(folder, monkeypatch):
    monkeypatch.setattr(nf4, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install bitsandbytes"):
        load_causal_lm(folder, nf4=FP32)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_next_stage_starts_from_what_was_published(tmp_path, name):
    """Three stages. To quantise the merged weights again would snap them back to where they came
    from: next to nothing of a small adapter would be left."""
    place = copy_of(name, tmp_path / "0")
    for number in (1, 2, 3):
        model = adapted(load_causal_lm(place, nf4=FP32), seed=number, scale=1e-3)
        reached = logprobs(model).detach()
        place = tmp_path / str(number)
        place.mkdir()
        save_causal_lm(model, place, tmp_path / str(number - 1))
        again = logprobs(load_causal_lm(place, nf4=FP32)).detach()
        rounding = (logprobs(load_causal_lm(place)) - reached).norm()
        assert (again - reached).norm() < 3 * rounding
        if name == "llama":
            shutil.move(place / "nf4", tmp_path / "aside")
            snapped = logprobs(load_causal_lm(place, nf4=FP32)).detach()
            assert (snapped - reached).norm() > 5 * (again - reached).norm(), "what it is for"
            shutil.move(tmp_path / "aside", place / "nf4")
    # The reference of the next stage: the policy without its own adapter, but with earlier ones.
    policy = adapted(load_causal_lm(place, nf4=FP32))
    with policy.disable_adapter():
        assert torch.equal(logprobs(policy), again)
    plain = dequantised(load_causal_lm(place, nf4=FP32))
    torch.testing.assert_close(logprobs(plain), again, atol=1e-5, rtol=1e-5)


def test_reward_model_too_starts_from_what_was_published(folder, tmp_path):
    sft, out = tmp_path / "sft", tmp_path / "reward"
    for place in (sft, out):
        place.mkdir()
    save_causal_lm(adapted(load_causal_lm(folder, nf4=FP32), scale=1e-3), sft, folder)
    model = new_scalar_model(sft, 0, nf4=FP32)
    model.backbone = adapted(model.backbone, seed=2, scale=1e-3)
    with torch.no_grad():
        expected = model(IDS, MASK)
        save_scalar_model(model, out, sft)
        rounding = (load_scalar_model(out)(IDS, MASK) - expected).norm()
        again = load_scalar_model(out, nf4=FP32)(IDS, MASK)
        untrained = new_scalar_model(folder, 0, nf4=FP32)(IDS, MASK)
    assert (again - expected).norm() < 3 * rounding
    assert (untrained - expected).norm() > 5 * (again - expected).norm()


def test_adapters_of_another_model_are_refused(folder, tmp_path):
    save_factors({"model.layers.7.mlp.up_proj": (torch.ones(1, 64), torch.ones(128, 1))}, folder)
    with pytest.raises(ModelError, match=r"layers\.7\.mlp\.up_proj, which is no quantised layer"):
        load_causal_lm(folder, nf4=FP32)
    load_causal_lm(folder)  # not quantised: the merged weights have it all
