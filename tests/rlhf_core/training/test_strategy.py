"""Sharded and replicated training on real gloo ranks give one result."""

import functools
import json
import os

import numpy as np
import pytest
import torch

from rlhf_core.jobs import Resources
from rlhf_core.runtime.distributed import computes_in_bf16
from rlhf_core.training.strategy import Strategy
from tests import forked
from tests.rlhf_core.torchrun import run_ranks

SCALING = ("ddp", "zero1", "zero2")
KINDS = (*SCALING, "fsdp2")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """World size -> what the ranks wrote."""
    folder = tmp_path_factory.mktemp("strategy")
    found = {}
    for size in (1, 2):
        out = folder / f"{size}.json"
        run_ranks(size, "tests.rlhf_core.training.strategy_ranks", str(out))
        found[size] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_strategies_and_ranks_give_the_same_losses_in_fp32(results, kind):
    oracle = plain_torch_losses()
    for size in (1, 2):
        np.testing.assert_allclose(results[size][f"{kind}-fp32"]["losses"], oracle, rtol=2e-6)


@pytest.mark.parametrize("micro", (1, 3, 6))
def test_micro_batches_do_not_change_the_losses(results, micro):
    oracle = plain_torch_losses()
    for size in (1, 2):
        np.testing.assert_allclose(results[size][f"micro-{micro}"]["losses"], oracle, rtol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_norm_is_that_of_the_global_batch(results, kind):
    for size in (1, 2):
        norms = results[size][f"{kind}-fp32"]["norms"]
        np.testing.assert_allclose(norms, results[1]["ddp-fp32"]["norms"], rtol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_state_restores_under_another_strategy(results, kind, precision):
    tolerance = 1e-6 if precision == "fp32" else 2e-3
    for size in (1, 2):
        found = results[size][f"{kind}-{precision}"]
        for name, value in found["after"].items():
            np.testing.assert_allclose(value, found["after_ddp"][name], atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_state_saved_on_two_ranks_is_that_of_one(results, kind):
    for name, value in results[1][f"{kind}-fp32"]["weights"].items():
        np.testing.assert_allclose(value, results[2][f"{kind}-fp32"]["weights"][name], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_stays_near_fp32(results, kind):
    for size in (1, 2):
        half = results[size][f"{kind}-bf16"]["losses"]
        np.testing.assert_allclose(half, results[1]["ddp-fp32"]["losses"], rtol=5e-3)


@pytest.mark.parametrize("kind", SCALING)
def test_fp16_overflow_skips_the_update_says_so_and_halves_the_scale(results, kind):
    for size in (1, 2):
        found = results[size][f"{kind}-overflow"]
        assert found["skipped"] == [1.0, 0.0, 0.0]
        assert found["moved"] == [False, True, True]
        assert found["scale"] == [2.0**15] * 3
        assert found["saved"] == 2.0**15


@pytest.mark.parametrize("kind", KINDS)
def test_infinite_gradient_is_found_before_the_weights_change(results, kind):
    for size in (1, 2):
        found = results[size][f"{kind}-not-finite"]
        assert found["error"] == "the gradient norm is nan"
        assert not found["moved"]


@functools.cache
def plain_torch_losses() -> list[float]:
    """The same training without ColossalAI, ranks or micro-batches, in a process of its own."""
    code = """
import json, torch
from torch import nn
generator = torch.Generator().manual_seed(0)
x = torch.randn(12, 7, generator=generator)
y = torch.randn(12, generator=generator)
w = torch.tensor([1.0 + i % 5 for i in range(12)])
torch.manual_seed(1)
model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1))
model[0].bias.requires_grad_(False)
opt = torch.optim.AdamW([{"params": [model[0].weight, model[2].weight], "lr": 0.1},
                         {"params": [model[2].bias], "lr": 0.05}])
losses = []
for step in range(4):
    for group, peak in zip(opt.param_groups, (0.1, 0.05)):
        group["lr"] = peak / (step + 1)
    loss = ((model(x).squeeze(1) - y).square() * w).sum() / w.sum()
    opt.zero_grad(); loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step(); losses.append(loss.item())
print(json.dumps(losses))
"""
    done = forked.run("-c", code, cwd=forked.ROOT, env=os.environ, needs=forked.MODELS)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("flags", "native"),
    [({}, False), ({"_is_avx512_bf16_supported"}, True), ({"_is_amx_tile_supported"}, True)],
)
def test_bf16_is_taken_where_the_processor_has_it(flags, native, monkeypatch):
    monkeypatch.setattr("rlhf_core.runtime.distributed.platform.machine", lambda: "x86_64")
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in flags)
    assert computes_in_bf16(torch.device("cpu")) is native
    assert computes_in_bf16(torch.device("cuda"))


@pytest.mark.parametrize(
    ("native", "kind", "precision", "taken"),
    [
        (False, "ddp", "bf16", "fp32"),
        (True, "ddp", "bf16", "bf16"),
        (False, "zero2", "bf16", "bf16"),  # its weights are in bf16 themselves
        (False, "ddp", "fp32", "fp32"),
    ],
)
def test_ddp_computes_in_fp32_where_bf16_would_be_slower(
    native, kind, precision, taken, monkeypatch, capsys
):
    monkeypatch.setattr("rlhf_core.training.strategy.computes_in_bf16", lambda device: native)
    strategy = Strategy(Resources(strategy=kind, device="cpu"), precision, 1.0)
    assert strategy.precision == taken
    with strategy.autocast():
        assert torch.is_autocast_enabled("cpu") is (taken == "bf16" and kind == "ddp")
    assert ("no bf16 arithmetic" in capsys.readouterr().out) is (taken != precision)
    torch.distributed.destroy_process_group()
