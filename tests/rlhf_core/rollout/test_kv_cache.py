"""The cache that is allocated once holds what transformers' own holds."""

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from rlhf_core.nn.fast_paths import switched
from rlhf_core.rollout import generate, grouped_attention, kv_cache
from rlhf_core.rollout.kv_cache import PreallocatedLayer
from tests.rlhf_core.nn.test_response_logprobs import _DECODER, make_model

PROMPTS = [[5, 7, 9, 4], [6], [8, 3], [5, 7, 9, 4]]


def decode(model: torch.nn.Module) -> generate.Rollout:
    return generate.generate(
        model, PROMPTS, max_new_tokens=8, eos_ids={0, 1, 2, 3}, pad_id=0, row_seeds=[1, 2, 3, 4]
    )


def test_buffers_show_what_concatenation_gives() -> None:
    torch.manual_seed(0)
    layer = PreallocatedLayer(6)
    first, second = torch.randn(2, 3, 2, 4, 5)  # keys and values alike: (3,2,4,5)
    layer.update(first, first + 1)
    layer.batch_select_indices(torch.tensor([0, 0, 1, 2]))
    more = torch.randn(4, 2, 2, 5)
    keys, values = layer.update(more, more + 1)
    want = torch.cat([first[[0, 0, 1, 2]], more], dim=2)
    assert torch.equal(keys, want) and torch.equal(values, want + 1)
    buffer = layer.buffers[0].data_ptr()
    layer.batch_select_indices(torch.tensor([1, 3]))
    assert torch.equal(layer.keys, want[[1, 3]]) and torch.equal(layer.values, want[[1, 3]] + 1)
    assert layer.buffers[0].data_ptr() == buffer, "nothing is allocated again"
    with pytest.raises(AssertionError, match="7 positions for 6"):
        layer.update(second[:2, :, :1], second[:2, :, :1])


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom"])
def test_replies_are_those_with_transformers_cache(name: str) -> None:
    model = make_model(name)
    cache = kv_cache.new_cache(model, 8)
    assert all(type(layer) is PreallocatedLayer for layer in cache.layers)
    found = decode(model)
    with switched(False):
        assert not any(type(x) is PreallocatedLayer for x in kv_cache.new_cache(model, 8).layers)
        want = decode(model)
    assert torch.equal(found.response_ids, want.response_ids)
    torch.testing.assert_close(found.logprobs, want.logprobs, atol=1e-5, rtol=1e-5)


def test_layers_with_a_window_keep_transformers_own() -> None:
    model = MistralForCausalLM(MistralConfig(**_DECODER, sliding_window=4)).eval()
    layers = kv_cache.new_cache(model, 8).layers
    assert not any(type(layer) is PreallocatedLayer for layer in layers)


def test_a_cache_that_gives_other_keys_is_not_used(monkeypatch, caplog) -> None:
    update = PreallocatedLayer.update

    def shifted(self, keys, values, *rest, **options):
        return update(self, keys * 1.01, values, *rest, **options)

    monkeypatch.setattr(PreallocatedLayer, "update", shifted)
    model = make_model("llama")
    assert not kv_cache.is_used(model)
    assert "key-value cache" in caplog.text and "its numbers differ by" in caplog.text


def test_a_batch_whose_fast_paths_fail_is_decoded_again_without_them(monkeypatch, caplog) -> None:
    """In the third step, when some of its rows have ended and tokens have been written."""
    model = make_model("llama")
    with switched(False):
        want = decode(model)
    assert kv_cache.is_used(model) and grouped_attention.is_used(model)
    update, calls = PreallocatedLayer.update, []

    def failing(self, *given, **options):
        calls.append(1)
        if len(calls) > 2 * 2:  # two layers, two steps
            raise RuntimeError("no kernel for a view like this")
        return update(self, *given, **options)

    monkeypatch.setattr(PreallocatedLayer, "update", failing)
    found = decode(model)
    for name in ("response_ids", "response_mask", "finished"):
        assert torch.equal(getattr(found, name), getattr(want, name)), name
    torch.testing.assert_close(found.logprobs, want.logprobs, atol=1e-5, rtol=1e-5)
    assert "no kernel for a view like this" in caplog.text
    assert not kv_cache.is_used(model) and not grouped_attention.is_used(model)
    assert model.config._attn_implementation == "sdpa"
    assert not [m for m in model.modules() if "forward" in vars(m)]
