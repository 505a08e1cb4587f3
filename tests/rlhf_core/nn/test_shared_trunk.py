"""Layers that models share are run once: the same numbers, to the last bit."""

import pytest
import torch

from rlhf_core.models.loading import load_causal_lm
from rlhf_core.nn.backbone import backbone_hidden
from rlhf_core.nn.fast_paths import FastPath, switched
from rlhf_core.nn.layers import transformer_layers
from rlhf_core.nn.response_logprobs import response_logprobs
from rlhf_core.nn.shared_trunk import Trunk, find_trunk
from rlhf_core.training.online.first_pass import FirstPass
from tests.rlhf_core.tiny_models import copy_of


def with_layers_trained(folder, count):
    model = load_causal_lm(folder).requires_grad_(False)
    for layer in list(transformer_layers(model)[1])[-count:]:
        layer.requires_grad_(True)
    return model


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "opt", "bloom"])
def test_models_go_on_from_the_trunk_with_the_same_numbers(tmp_path, architecture):
    folder = copy_of(architecture, tmp_path / "model")
    trained, other = with_layers_trained(folder, 1), load_causal_lm(folder).requires_grad_(False)
    with torch.no_grad():  # they differ above the trunk
        for param in transformer_layers(other)[1][-1].parameters():
            param.add_(0.01 * torch.randn_like(param))
    trunk = find_trunk([trained, other])
    assert trunk is not None and trunk.depth == 2
    ids = torch.randint(3, 900, (2, 7))
    mask = torch.ones_like(ids).bool()
    mask[1, 5:] = False
    first_pass = FirstPass(trunk)
    for model in (trained, other):
        want = backbone_hidden(model, ids, mask)
        with first_pass.shared_layers([4, 5], ids, mask):
            found = backbone_hidden(model, ids, mask)
        assert torch.equal(found[mask], want[mask])
    names = [name for name, _ in trained.named_parameters()]
    assert names == [name for name, _ in load_causal_lm(folder).named_parameters()]


def test_gradients_are_the_same_with_checkpointing_too(tmp_path):
    folder = copy_of("llama", tmp_path / "model")
    ids = torch.randint(3, 900, (2, 7))
    mask = torch.ones_like(ids).bool()
    mask[1, 4:] = False

    def gradients(share, checkpointing):
        model = with_layers_trained(folder, 2)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        trunk = find_trunk([model, load_causal_lm(folder).requires_grad_(False)]) if share else None
        with FirstPass(trunk).shared_layers([0, 1], ids, mask):
            loss = backbone_hidden(model, ids, mask)[mask].square().mean()
        loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    for checkpointing in (False, True):
        want = gradients(False, checkpointing)
        assert want
        found = gradients(True, checkpointing)
        assert found.keys() == want.keys()
        assert all(torch.equal(found[n], want[n]) for n in want)


def test_the_trunk_ends_where_models_differ_or_train(tmp_path):
    folder = copy_of("llama", tmp_path / "model")
    first, second = with_layers_trained(folder, 1), load_causal_lm(folder).requires_grad_(False)
    with torch.no_grad():
        next(transformer_layers(second)[1][1].parameters())[0] += 1e-3
    assert find_trunk([first, second]).depth == 1
    with torch.no_grad():
        second.get_input_embeddings().weight[5] += 1e-3
    assert find_trunk([first, second]) is None
    assert find_trunk([load_causal_lm(folder).requires_grad_(True)]) is None


def test_no_model_is_tried_out_while_its_layers_are_replaced(tmp_path, monkeypatch):
    """It would seem to fail every trial."""
    folder = copy_of("llama", tmp_path / "model")
    models = [with_layers_trained(folder, 1), load_causal_lm(folder).requires_grad_(False)]
    trunk = find_trunk(models)
    ids = torch.randint(3, 900, (2, 7))
    mask = torch.ones_like(ids).bool()  # no padding to leave out
    hidden = trunk.run(ids, mask)
    monkeypatch.setattr(FastPath, "try_out", lambda *given: pytest.fail("a trial ran"))
    with trunk.replaced_by(hidden):
        for model in models:
            response_logprobs(model, ids, mask, None, mask[:, 1:])
            backbone_hidden(model, ids, mask.tril(5))


def test_nothing_is_left_on_the_models_and_a_trunk_that_changes_numbers_is_not_used(
    tmp_path, monkeypatch, caplog
):
    folder = copy_of("llama", tmp_path / "model")
    models = [with_layers_trained(folder, 1), load_causal_lm(folder).requires_grad_(False)]
    trunk = find_trunk(models)
    ids = torch.randint(3, 900, (2, 7))
    hidden = trunk.run(ids, torch.ones_like(ids).bool())
    with pytest.raises(KeyError), trunk.replaced_by(hidden):
        raise KeyError
    for module in (m for model in models for m in model.modules()):
        assert "forward" not in vars(module), module
        assert not module._forward_pre_hooks and not module._forward_hooks, module
    with switched(False):
        assert find_trunk(models) is None
    run = Trunk.run
    monkeypatch.setattr(Trunk, "run", lambda self, *batch: run(self, *batch) * 1.001)
    assert find_trunk(models) is None
    assert "lower layers run once" in caplog.text and "its numbers differ by" in caplog.text
