"""Rows without their padding give the numbers and gradients of rows with it."""

import pytest
import torch
from torch import nn
from transformers import MistralConfig, MistralForCausalLM

from rlhf_core.nn import unpadded
from rlhf_core.nn.backbone import backbone, backbone_hidden
from rlhf_core.nn.modules import Policy, ScalarModel, padding_cost
from rlhf_core.nn.padding import TokenIndex, flat_indices
from rlhf_core.nn.response_logprobs import response_logprobs
from tests.rlhf_core.nn.test_response_logprobs import _DECODER, D, V, make_model

LENGTHS = (9, 4, 1, 6)


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, V, (4, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(9) < torch.tensor(LENGTHS).unsqueeze(1)
    return ids.masked_fill(~mask, 0), mask


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "opt"])
def test_hidden_states_and_gradients_are_those_of_each_row_alone(name: str) -> None:
    model, (ids, mask) = make_model(name), rows()
    weights = torch.randn(4, 9, 1, generator=torch.Generator().manual_seed(4))
    base = backbone(model)
    assert unpadded.is_used(base)
    found = unpadded.hidden_states(base, ids, flat_indices(mask))
    assert not found[~mask].any()
    (found * weights).sum().backward()
    grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for row, length in enumerate(LENGTHS):
        alone = base(input_ids=ids[row : row + 1, :length], use_cache=False)[0][0]
        torch.testing.assert_close(found[row, :length], alone, atol=1e-5, rtol=1e-4)
        (alone * weights[row, :length]).sum().backward()
    for k, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(grads[k], p.grad, atol=1e-4, rtol=1e-3)
    assert base.config._attn_implementation == "sdpa"


def test_no_padding_is_computed_but_in_attention() -> None:
    model, (ids, mask) = make_model("llama"), rows()
    seen: list[tuple[int, ...]] = []
    hook = model.model.layers[1].mlp.register_forward_hook(
        lambda module, args, output: seen.append(tuple(args[0].shape))
    )
    backbone_hidden(model, ids, mask)
    assert seen[-1] == (1, sum(LENGTHS), D)
    backbone_hidden(model, ids, torch.ones_like(mask))  # nothing to leave out
    assert seen[-1] == (4, 9, D)
    hook.remove()


def test_models_that_attend_in_a_way_of_their_own_keep_their_padding() -> None:
    windowed = MistralForCausalLM(MistralConfig(**_DECODER, sliding_window=4)).eval()
    eager = make_model("llama")
    eager.set_attn_implementation("eager")
    for model in (windowed, eager, make_model("bloom"), make_model("gemma2")):
        assert not unpadded.is_used(backbone(model))
    changed = make_model("llama")
    assert unpadded.is_used(backbone(changed))
    changed.set_attn_implementation("eager")  # after it was tried out
    assert not unpadded.is_used(backbone(changed))


def test_layers_that_run_again_in_the_backward_pass_keep_their_padding() -> None:
    model, (ids, mask) = make_model("llama"), rows()
    model.train()
    model.gradient_checkpointing_enable()
    assert not unpadded.is_used(model.model)
    assert padding_cost(Policy(model)) == 1.0
    hidden = backbone_hidden(model, ids, mask)
    hidden[mask].sum().backward()
    model.gradient_checkpointing_disable()
    assert unpadded.is_used(model.model)


def test_models_of_a_trunk_all_leave_padding_out_or_none_does() -> None:
    checkpointing, plain = make_model("llama"), make_model("llama")
    unpadded.use_alike([checkpointing.model, plain.model])
    assert unpadded.is_used(plain.model)
    checkpointing.gradient_checkpointing_enable()
    unpadded.use_alike([checkpointing.model, plain.model])
    assert not unpadded.is_used(plain.model)


def test_attention_that_fails_in_training_falls_back_and_leaves_the_config_as_it_was(
    monkeypatch, caplog
) -> None:
    """On a GPU, say: a kernel that refuses a shape which no trial has seen."""
    model, (ids, mask) = make_model("llama"), rows()
    assert unpadded.is_used(model.model)
    want = model.model(input_ids=ids, attention_mask=mask.long(), use_cache=False)[0]
    real = unpadded.sdpa_attention_forward

    def refuse(*args, **options):
        raise RuntimeError("no kernel for this shape")

    monkeypatch.setattr(unpadded, "sdpa_attention_forward", refuse)
    found = backbone_hidden(model, ids, mask)
    torch.testing.assert_close(found[mask], want[mask], atol=1e-5, rtol=1e-5)
    assert "no kernel for this shape" in caplog.text and "rows without padding" in caplog.text
    config = model.config
    assert config._attn_implementation == "sdpa" and not hasattr(config, "unpadded_layout")
    monkeypatch.setattr(unpadded, "sdpa_attention_forward", real)
    assert not unpadded.is_used(model.model), "it stays off for this model"
    assert unpadded.is_used(make_model("llama").model)


def test_padding_is_cheap_only_where_every_model_leaves_it_out() -> None:
    lean, heavy = make_model("llama"), make_model("bloom")
    assert padding_cost(Policy(lean)) == unpadded.ATTENTION_SHARE
    assert padding_cost(ScalarModel(lean.model, D)) == unpadded.ATTENTION_SHARE
    assert padding_cost(nn.ModuleList([Policy(lean), ScalarModel(heavy.base_model, D)])) == 1.0
    assert padding_cost(nn.Linear(2, 2)) == 1.0


class _Read(Exception):
    """The host has read a tensor."""


@pytest.mark.parametrize("lengths", [LENGTHS, (9, 9, 9, 9)])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "opt"])
def test_a_forward_pass_with_an_index_reads_nothing_back(name, lengths, monkeypatch) -> None:
    """On a GPU each reading would wait. Rows with padding, and rows without."""
    model = make_model(name)
    mask = torch.arange(9) < torch.tensor(lengths).unsqueeze(1)
    ids = rows()[0].masked_fill(~mask, 0)
    loss_mask = mask & (torch.arange(9) > 2)
    index = TokenIndex.of(mask, loss_mask)
    want = response_logprobs(model, ids, mask, None, loss_mask)

    def refuse(*_: object) -> None:
        raise _Read

    for reading in ("__bool__", "__int__", "__float__", "item", "tolist", "nonzero"):
        monkeypatch.setattr(torch.Tensor, reading, refuse)
    found = response_logprobs(model, ids, mask, None, loss_mask, index=index)
    monkeypatch.undo()
    assert torch.equal(found, want)
    with pytest.raises(_Read):
        monkeypatch.setattr(torch.Tensor, "nonzero", refuse)
        response_logprobs(model, ids, mask, None, loss_mask)


def test_a_window_is_kept_where_rows_have_no_mask() -> None:
    windowed = MistralForCausalLM(MistralConfig(**_DECODER, sliding_window=4)).eval()
    ids, _ = rows()
    whole = torch.ones_like(ids, dtype=torch.bool)
    found = backbone_hidden(windowed, ids, whole, index=TokenIndex.of(whole))
    want = windowed.model(input_ids=ids, attention_mask=whole.long(), use_cache=False)[0]
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
