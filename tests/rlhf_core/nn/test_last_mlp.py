"""The last layer's MLP at some positions gives what is read there, and its gradients."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from rlhf_core.nn import last_mlp
from rlhf_core.nn.backbone import BareBackbone, backbone_hidden
from rlhf_core.nn.layers import transformer_layers
from rlhf_core.nn.modules import ScalarModel
from rlhf_core.nn.shared_prompt import collate_shared
from tests.rlhf_core.nn.test_response_logprobs import D, make_model

IDS = torch.tensor([[5, 9, 4, 8, 33], [6, 7, 3, 10, 11]])
MASK = torch.ones_like(IDS)
READ = torch.tensor([[0, 0, 1, 0, 1], [0, 0, 1, 0, 0]]).bool()


def make(name: str) -> nn.Module:
    return make_model(name).base_model


def gradients(model: nn.Module, only: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    with last_mlp.only_at(model, READ) if only else contextlib.nullcontext():
        hidden = backbone_hidden(BareBackbone(model), IDS, MASK)[READ]
    hidden.square().sum().backward()
    return hidden.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "cohere", "gemma2", "granite"])
def test_what_is_read_and_all_gradients_are_the_same(name: str) -> None:
    model = make(name)
    assert last_mlp.can_leave_out(model)
    want, slopes = gradients(model, only=False)
    found, others = gradients(model, only=True)
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
    assert others.keys() == slopes.keys()
    for key, grad_hidden_cache in slopes.items():
        torch.testing.assert_close(others[key], grad_hidden_cache, atol=1e-4, rtol=1e-4, msg=key)


def test_the_mlp_sees_no_other_row_and_is_given_back() -> None:
    model = make("llama")
    mlp = transformer_layers(model)[1][-1].mlp
    seen = []
    mlp.gate_proj.register_forward_pre_hook(
        lambda m, given: seen.append(given[0].shape[:-1].numel())
    )
    gradients(model, only=False)
    assert last_mlp.can_leave_out(model)
    seen.clear()
    gradients(model, only=True)
    assert seen == [3]
    with pytest.raises(RuntimeError, match="in the middle"), last_mlp.only_at(model, READ):
        raise RuntimeError("in the middle")
    assert "forward" not in vars(mlp)


def test_models_in_which_it_would_change_something_run_as_ever() -> None:
    opt, bloom = make("opt"), make("bloom")
    assert not last_mlp.can_leave_out(opt)  # its layers have no module for the MLP
    assert not last_mlp.can_leave_out(bloom)  # the residual goes through it
    checkpointing = make("llama").train()
    checkpointing.gradient_checkpointing_enable()
    for model in (opt, bloom, checkpointing):
        want, _ = gradients(copy.deepcopy(model), only=False)
        found, _ = gradients(model, only=True)
        assert torch.equal(found, want)

    class Mixing(nn.Module):
        """Looks at other positions."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.cumsum(dim=1)

    model = make("llama")
    transformer_layers(model)[1][-1].mlp = Mixing()
    assert not last_mlp.can_leave_out(model)


def test_rows_without_their_padding_are_computed_whole() -> None:
    model = make("llama")
    mask = MASK.clone()
    mask[1, 3:] = 0
    want = backbone_hidden(BareBackbone(model), IDS, mask)
    with last_mlp.only_at(model, READ):
        assert torch.equal(backbone_hidden(BareBackbone(model), IDS, mask), want)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_pairs_that_share_a_row_have_the_scores_of_whole_passes(pooling: str, monkeypatch) -> None:
    model = ScalarModel(make("llama"), D)
    model.reset_head(0)
    model.pooling = pooling
    pairs = [
        {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [10, 11, 12]},
        {"prompt_ids": [13], "chosen_ids": [14, 15, 16], "rejected_ids": [17]},
    ]
    batch = collate_shared(pairs, torch.device("cpu"))
    calls = []
    real = last_mlp._replaced
    assert last_mlp.can_leave_out(model.backbone)
    monkeypatch.setattr(last_mlp, "_replaced", lambda *a: calls.append(1) or real(*a))
    found = model(*batch)
    assert len(calls) == (pooling == "last")
    monkeypatch.setattr(last_mlp, "can_leave_out", lambda backbone: False)
    torch.testing.assert_close(found, model(*batch), atol=1e-5, rtol=1e-5)
