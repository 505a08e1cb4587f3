"""Linear layers that are computed the other way round give the numbers of torch's."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from rlhf_core.nn import small_batch_linear
from rlhf_core.nn.fast_paths import switched
from rlhf_core.rollout import generate
from tests.rlhf_core.nn.test_response_logprobs import make_model

SMALL, LARGE = (48, 64), (2**10, 2**9)


@pytest.fixture
def straight(monkeypatch) -> list[int]:
    """Rows of each product that torch's own function computed."""
    found: list[int] = []
    real = F.linear

    def watched(x, weight, bias=None):
        found.append(x.numel() // x.shape[-1])
        return real(x, weight, bias)

    monkeypatch.setattr(small_batch_linear.F, "linear", watched)
    return found


@pytest.mark.parametrize("shape", [SMALL, LARGE])
@pytest.mark.parametrize("rows", [0, 1, 3, 4, 11, 12, 56, 57])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_numbers_are_those_of_linear(shape, rows: int, bias: bool, straight: list[int]) -> None:
    torch.manual_seed(rows)
    layer = nn.Linear(shape[1], shape[0], bias=bias)
    x = torch.randn(rows, shape[1])
    found = small_batch_linear.linear(x, layer.weight, layer.bias)
    least = 4 if shape == LARGE else 12
    assert straight == ([] if least <= rows <= 56 else [rows])
    assert found.is_contiguous()
    want = x.double() @ layer.weight.double().t() + (layer.bias.double() if bias else 0)
    torch.testing.assert_close(found.double(), want, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_leading_dimensions_and_strides_of_the_input_are_kept(straight: list[int]) -> None:
    weight = torch.randn(48, 64)
    x = torch.randn(5, 64, 4).transpose(1, 2)  # (5,4,64), not contiguous
    found = small_batch_linear.linear(x, weight)
    assert found.shape == (5, 4, 48) and straight == []
    torch.testing.assert_close(found, x @ weight.t(), atol=1e-5, rtol=1e-5)


def test_half_precision_and_gradients_take_torchs_way(straight: list[int]) -> None:
    x, weight = torch.randn(16, 64), torch.randn(48, 64, requires_grad=True)
    small_batch_linear.linear(x, weight).sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        small_batch_linear.linear(x.bfloat16(), weight.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            assert small_batch_linear.linear(x, weight).dtype == torch.bfloat16
    assert straight == [16, 16, 16]


def test_only_plain_layers_change_and_all_are_given_back(straight: list[int]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Tanh())
    model[1].forward = lambda x: x + 1  # type: ignore[method-assign]
    replaced = model[1].forward
    with pytest.raises(RuntimeError, match="in the middle"), small_batch_linear.installed(model):
        with torch.no_grad():
            model(torch.randn(1, 8))
        raise RuntimeError("in the middle")
    # the trial, then the first layer through ours, which had one row
    assert straight == [16, 1]
    assert "forward" not in vars(model[0]) and model[1].forward is replaced


@pytest.mark.parametrize("name", ["llama", "opt", "lora"])
def test_replies_are_those_without_it(name: str, monkeypatch) -> None:
    model: nn.Module = make_model("llama" if name == "lora" else name)
    if name == "lora":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], r=2))
        for key, value in model.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(value, std=0.1)
    turned: list[int] = []
    way = small_batch_linear._is_faster

    def watched(rows, x, weight):
        turned.append(way(rows, x, weight))
        return turned[-1]

    monkeypatch.setattr(small_batch_linear, "_is_faster", watched)

    def decode() -> generate.Rollout:
        prompts = [[5 + i % 7, 9, 4][: 1 + i % 3] for i in range(16)]
        return generate.generate(
            model, prompts, max_new_tokens=8, eos_ids={0}, pad_id=0, row_seeds=range(16)
        )

    found = decode()
    assert sum(turned) > len(turned) / 2
    assert not [m for m in model.modules() if "forward" in vars(m)]
    turned.clear()
    with switched(False):
        want = decode()
    assert not turned
    assert torch.equal(found.response_ids, want.response_ids)
    torch.testing.assert_close(found.logprobs, want.logprobs, atol=1e-5, rtol=1e-5)


def test_a_model_in_half_precision_keeps_its_own_forwards() -> None:
    single, half = nn.Linear(8, 8), nn.Linear(8, 8).bfloat16()
    with small_batch_linear.installed(nn.ModuleList([single, half])):
        assert "forward" in vars(single) and "forward" not in vars(half)
    with torch.autocast("cpu", torch.bfloat16), small_batch_linear.installed(single):
        assert "forward" not in vars(single)
