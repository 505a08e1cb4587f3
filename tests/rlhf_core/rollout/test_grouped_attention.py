"""Decoding without repeated keys and values gives the numbers of decoding with them."""

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from rlhf_core.nn.fast_paths import switched
from rlhf_core.rollout import generate, grouped_attention
from tests.rlhf_core.nn.test_response_logprobs import _DECODER, V, make_model

PROMPTS = [[5, 7, 9, 4], [6], [8, 3], [11, 12, 13, 4, 5, 9]]


def grouped(name: str, **changes: object) -> torch.nn.Module:
    model = make_model(name)
    config = type(model.config)(**{**model.config.to_dict(), "num_key_value_heads": 2, **changes})
    torch.manual_seed(1)
    found = type(model)(config).eval()
    assert found.config._attn_implementation == "sdpa"
    return found


def decode(model: torch.nn.Module) -> generate.Rollout:
    return generate.generate(
        model, PROMPTS, max_new_tokens=12, eos_ids={0}, pad_id=0, row_seeds=[1, 2, 3, 4]
    )


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_tokens_and_logprobs_are_those_with_repeated_heads(name: str, monkeypatch) -> None:
    model = grouped(name)
    repeated: list[int] = []
    sdpa = grouped_attention.sdpa_attention_forward

    def watched(module, query, *rest, **options):
        repeated.append(query.shape[2])
        return sdpa(module, query, *rest, **options)

    monkeypatch.setattr(grouped_attention, "sdpa_attention_forward", watched)
    found = decode(model)
    assert repeated and min(repeated) > 1  # prompts only, no single token
    assert model.config._attn_implementation == "sdpa"

    repeated.clear()
    with switched(False):
        want = decode(model)
    assert not repeated, "transformers' own attention, which is not watched here"
    assert torch.equal(found.response_ids, want.response_ids)
    torch.testing.assert_close(found.logprobs, want.logprobs, atol=1e-5, rtol=1e-5)


def test_attention_that_was_changed_meanwhile_stays_as_it_is() -> None:
    model = grouped("llama")
    with grouped_attention.installed(model):  # tried out
        assert model.config._attn_implementation == grouped_attention.ATTENTION
    model.set_attn_implementation("eager")
    with grouped_attention.installed(model):
        assert model.config._attn_implementation == "eager"
    assert model.config._attn_implementation == "eager"


def test_heads_of_a_group_meet_their_own_keys() -> None:
    """Against attention written out, with scores that the scale and the mask change."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 1, 3), torch.randn(2, 2, 5, 3), torch.randn(2, 2, 5, 3)
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    mask[1, :, :, :2] = False
    found, _ = grouped_attention._attention(torch.nn.Module(), query, key, value, mask, scaling=0.3)
    for row in range(2):
        for head in range(4):
            scores = 0.3 * key[row, head // 2] @ query[row, head, 0]
            weights = scores.masked_fill(~mask[row, 0, 0], -torch.inf).softmax(0)
            torch.testing.assert_close(found[row, 0, head], weights @ value[row, head // 2])


def test_models_without_groups_or_with_windows_decode_as_before() -> None:
    windowed = MistralForCausalLM(
        MistralConfig(**_DECODER | {"num_key_value_heads": 2}, sliding_window=4)
    ).eval()
    for model in (make_model("gpt2"), make_model("bloom"), windowed):
        found = decode(model)
        again = decode(model)
        assert torch.equal(found.response_ids, again.response_ids)
        assert int(found.response_ids.max()) < V


def test_a_model_whose_numbers_would_differ_is_left_alone(monkeypatch) -> None:
    real = grouped_attention.F.scaled_dot_product_attention

    def wrong(query, key, value, *mask, **options):  # transformers gives its mask by name
        found = real(query, key, value, *mask, **options)
        return found + 0.1 if mask else found

    monkeypatch.setattr(grouped_attention.F, "scaled_dot_product_attention", wrong)
    model = grouped("llama")
    with grouped_attention.installed(model):
        assert model.config._attn_implementation == "sdpa"
    monkeypatch.undo()
    model = grouped("llama")
    with grouped_attention.installed(model):
        assert model.config._attn_implementation == grouped_attention.ATTENTION
