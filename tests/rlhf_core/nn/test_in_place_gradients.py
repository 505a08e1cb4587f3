"""Gradients added where they lie are those that autograd adds up."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from rlhf_core.nn import in_place_gradients
from rlhf_core.nn.response_logprobs import response_logprobs
from rlhf_core.nn.small_batch_linear import few_rows
from rlhf_core.nn.vocabulary_head import lm_head
from tests.rlhf_core.nn.test_response_logprobs import batch, make_model

NAMES = ["llama", "llama-tied", "gpt2", "opt", "bloom", "gemma2", "lora"]


def make(name: str) -> nn.Module:
    if name == "lora":
        model = get_peft_model(
            make_model("llama"), LoraConfig(target_modules=["q_proj", "down_proj"], r=2)
        )
        for key, value in model.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(value, std=0.1)
        return model
    if name == "llama-tied":
        model = make_model("llama")
        model.lm_head.weight = model.model.embed_tokens.weight
        return model
    return make_model(name)


def backward(model: nn.Module, passes: int) -> None:
    """Some passes over rows that differ from pass to pass."""
    ids, attention, mask = batch()
    for number in range(passes):
        moved = torch.where(attention.bool(), (ids + number) % 7 + 3, ids)
        found = response_logprobs(model, moved, attention, None, mask)
        found[mask].square().sum().backward()


def in_place(model: nn.Module) -> nn.Module:
    in_place_gradients.add_in_place(model)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_a_models_gradients_are_autograds(name: str) -> None:
    model = make(name)
    other = in_place(copy.deepcopy(model))
    for _ in range(2):  # optimizer steps
        for side in (model, other):
            side.zero_grad()
            backward(side, 3)
        for (key, want), found in zip(model.named_parameters(), other.parameters(), strict=True):
            assert (want.grad is None) == (found.grad is None), key
            if want.grad is not None:
                torch.testing.assert_close(found.grad, want.grad, atol=1e-5, rtol=1e-5, msg=key)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "opt"])
def test_no_matrix_is_handed_to_autograd(name: str) -> None:
    """Neither in the first pass, where it becomes the gradient, nor in those that add to it."""
    model = in_place(make(name))
    came: list[str] = []
    wide = [(k, p) for k, p in model.named_parameters() if p.dim() == 2 and "positions" not in k]
    for key, parameter in wide:
        parameter.register_hook(
            lambda grad, key=key: came.append(key) if grad is not None else None
        )
    backward(model, 1)
    first = {key: parameter.grad.data_ptr() for key, parameter in wide}
    backward(model, 2)
    assert came == []
    assert {key: parameter.grad.data_ptr() for key, parameter in wide} == first


@pytest.mark.parametrize("rows", [(7,), (3, 5), (2, 3, 4), (0,)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_in_fp64_is_the_formula(rows: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, bias=bias, dtype=torch.float64)
    in_place(layer)
    want_weight, want_bias = torch.zeros(4, 6).double(), torch.zeros(4).double()
    for _ in range(3):
        x = torch.randn(*rows, 6, dtype=torch.float64, requires_grad=True)
        grad_hidden_cache = torch.randn(*rows, 4, dtype=torch.float64)
        out = layer(x)
        torch.testing.assert_close(
            out, x @ layer.weight.t() + (layer.bias if bias else 0), rtol=1e-12, atol=1e-12
        )
        (out * grad_hidden_cache).sum().backward()
        torch.testing.assert_close(x.grad, grad_hidden_cache @ layer.weight)
        want_weight += grad_hidden_cache.reshape(-1, 4).t() @ x.detach().reshape(-1, 6)
        want_bias += grad_hidden_cache.reshape(-1, 4).sum(0)
    torch.testing.assert_close(layer.weight.grad, want_weight)
    if bias:
        torch.testing.assert_close(layer.bias.grad, want_bias)


def test_embedding_leaves_its_padding_token_out_and_adds_a_token_as_often_as_it_comes() -> None:
    layer = in_place(nn.Embedding(5, 2, padding_idx=1))
    for _ in range(2):
        layer(torch.tensor([[0, 1, 4], [4, 4, 1]])).sum().backward()
    assert layer.weight.grad[:, 0].tolist() == [2.0, 0.0, 0.0, 0.0, 6.0]


def test_frozen_weights_get_no_gradient_and_pass_on_the_slope() -> None:
    frozen = nn.Linear(4, 4).requires_grad_(False)
    model = in_place(nn.Sequential(nn.Linear(4, 4), frozen))
    model(torch.randn(3, 4)).sum().backward()
    assert frozen.weight.grad is None and model[0].weight.grad.abs().sum() > 0


def test_under_autocast_and_for_odd_embeddings_torchs_own_way_is_taken() -> None:
    torch.manual_seed(0)
    x, layer = torch.randn(5, 6), nn.Linear(6, 4)
    other = in_place(copy.deepcopy(layer))
    for side in (layer, other):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                out = side(x)
            assert out.dtype == torch.bfloat16
            out.sum().backward()
    assert torch.equal(layer.weight.grad, other.weight.grad)
    odd = in_place(nn.ModuleList([nn.Embedding(4, 2, max_norm=1.0), nn.Embedding(4, 2)]))
    assert [type(m) for m in odd] == [nn.Embedding, in_place_gradients.Embedding]


def test_a_layer_that_is_not_plain_keeps_its_class() -> None:
    class Own(nn.Linear):
        pass

    model = in_place(nn.ModuleList([Own(2, 2), nn.Linear(2, 2)]))
    assert [type(m) for m in model] == [Own, in_place_gradients.Linear]


def test_decoding_and_the_head_still_know_the_layers() -> None:
    model = in_place(make("llama"))
    assert lm_head(model) is not None
    with few_rows(model):
        turned = [m for m in model.modules() if "forward" in vars(m)]
    assert len(turned) == sum(isinstance(m, nn.Linear) for m in model.modules())


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = make("llama").train()
    other = in_place(copy.deepcopy(model))
    other.gradient_checkpointing_enable()
    for side in (model, other):
        backward(side, 2)
    wanted: list[Tensor] = [p.grad for p in model.parameters()]
    for want, found in zip(wanted, other.parameters(), strict=True):
        torch.testing.assert_close(found.grad, want, atol=1e-5, rtol=1e-5)
