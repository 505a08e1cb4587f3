"""RMSNorm as one kernel: the same numbers, on a GPU only, and only where it is the same formula."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from rlhf_core.nn import fast_paths, fused_norms


@pytest.fixture(autouse=True)
def a_gpu_is_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def with_norm(kind, width=64, dtype=torch.float32):
    torch.manual_seed(1)
    norm = kind(width, eps=1e-5).to(dtype)
    norm.weight.data = torch.rand(width).to(dtype) + 0.5
    return torch.nn.Sequential(norm)


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU."""

    @property
    def device(self):
        return torch.device("cuda", 0)


def run_pretended(model, x, monkeypatch):
    """The output and the number of calls of the one kernel."""
    calls = []
    real = fused_norms.fused

    def count(norm, x):
        calls.append(norm)
        return real(norm, x.as_subclass(torch.Tensor))

    monkeypatch.setattr(fused_norms, "fused", count)
    return model[0](x.as_subclass(OnGPU)).as_subclass(torch.Tensor), len(calls)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen2RMSNorm, Olmo2RMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_and_gradients_are_those_of_transformers(kind, dtype, monkeypatch):
    model, x = with_norm(kind, dtype=dtype), torch.randn(5, 7, 64).to(dtype)
    plain, want_x = copy.deepcopy(model), x.clone().requires_grad_()
    weights = torch.randn(5, 7, 64).to(dtype)
    want = plain(want_x)
    (want * weights).sum().backward()
    fused_norms.install(model)
    found_x = x.clone().requires_grad_()
    found, calls = run_pretended(model, found_x, monkeypatch)
    (found * weights).sum().backward()
    assert calls == 1
    pairs = [(found, want), (found_x.grad, want_x.grad)]
    for a, b in [*pairs, (model[0].weight.grad, plain[0].weight.grad)]:
        assert (a - b).abs().max() <= 4 * torch.finfo(dtype).eps * b.abs().max()


def test_a_cpu_keeps_the_models_own_code():
    model, x = with_norm(LlamaRMSNorm), torch.randn(3, 64)
    want = model(x)
    fused_norms.install(model)
    assert torch.equal(model(x), want)


def test_nothing_is_installed_or_logged_without_a_gpu(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fast_paths._logged.clear()
    for kind in (LlamaRMSNorm, Gemma2RMSNorm):
        model = with_norm(kind)
        fused_norms.install(model)
        assert "forward" not in vars(model[0])
    assert not caplog.text


def test_a_norm_of_another_formula_keeps_its_code(monkeypatch, caplog):
    fast_paths._logged.clear()
    model, x = with_norm(Gemma2RMSNorm), torch.randn(3, 64)
    want = model(x)
    fused_norms.install(model)
    found, calls = run_pretended(model, x, monkeypatch)
    assert calls == 0 and torch.equal(found, want)
    assert "fast path off for Sequential: RMSNorm as one kernel" in caplog.text


def test_without_fast_paths_and_in_mixed_dtypes_the_plain_code_runs(monkeypatch):
    model, x = with_norm(LlamaRMSNorm), torch.randn(3, 64)
    fused_norms.install(model)
    with fast_paths.switched(False):
        assert run_pretended(model, x, monkeypatch)[1] == 0
    assert run_pretended(model, x.bfloat16(), monkeypatch)[1] == 0


def test_a_copy_of_a_model_has_norms_of_its_own():
    model = with_norm(LlamaRMSNorm)
    fused_norms.install(model)
    other = copy.deepcopy(model)
    other[0].weight.data.zero_()
    assert not other(torch.ones(1, 64)).any() and model(torch.ones(1, 64)).all()
