"""Two ranks on pretended GPUs: the group's methods, and every strategy."""

import json
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

from rlhf_core.jobs import Strategy
from tests.gpu.ranks import STAGES

pytestmark = pytest.mark.slow

KINDS = get_args(Strategy)


@pytest.fixture(scope="module")
def ranks(compute, tmp_path_factory):
    """What each rank found, check by check."""
    out = tmp_path_factory.mktemp("ranks") / "results.json"
    compute("tests.gpu.ranks", out)
    return [json.loads(out.with_suffix(f".{rank}").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("check", "found"),
    [
        ("sum", [2.0, 1.0]), ("sum on the GPU", [2.0, 2.0]), ("any", [True, False]),
        ("gather", [{"rank": 0}, {"rank": 1}]), ("broadcast", "from 0"), ("barrier", None),
        ("in_order", ["of 1", "of 0"]), ("interleave", [0, 1, 2, 3]),
    ],
)  # fmt: skip
def test_group_on_gpus(ranks, check, found):
    assert [rank[check] for rank in ranks] == [{"found": found}] * 2


def test_each_rank_has_its_device(ranks):
    assert [rank["device"]["found"] for rank in ranks] == [["cuda:0", 0], ["cuda:1", 1]]


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("refuses a CPU tensor", "No backend type associated with device type cpu"),
        ("refuses a pickled GPU tensor", "a tensor on the GPU is pickled"),
        ("refuses tensors of two GPUs", "Expected all tensors to be on the same device"),
    ],
)
def test_what_gpus_refuse(ranks, what, error):
    for rank in ranks:
        assert error in rank[what].get("error", "nothing was raised")


def of_strategy(ranks, kind, precision):
    """What both ranks found; fails with the traceback of the first that failed."""
    results = [rank[f"{kind}-{precision}"] for rank in ranks]
    for result in results:
        assert "error" not in result, result["traceback"]
    return [result["found"] for result in results]


@pytest.mark.parametrize(
    ("kind", "precision"),
    [(k, p) for k in KINDS for p in ("fp32", "bf16", "fp16") if (k, p) != ("fsdp2", "fp16")],
)
def test_strategy_resumes_exactly_and_ranks_agree(ranks, kind, precision):
    first, second = of_strategy(ranks, kind, precision)
    assert first == second
    assert first["resumed"] == first["losses"][2:]
    assert first["resumed_weights"] == first["weights"]
    assert first["saved_on"] == ["cpu"]
    assert "0.bias" not in first["weights"], "it is frozen"


@pytest.mark.parametrize("kind", KINDS)
def test_strategy_in_fp32_computes_as_plain_torch(ranks, kind):
    found, _ = of_strategy(ranks, kind, "fp32")
    np.testing.assert_allclose(found["losses"], plain_torch(), rtol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_strategy_in_bf16_computes_nearly_the_same(ranks, kind):
    found, _ = of_strategy(ranks, kind, "bf16")
    np.testing.assert_allclose(found["losses"], plain_torch(), rtol=0.02)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "fsdp2"])
def test_strategy_in_fp16_lowers_its_loss_scale_and_goes_on(ranks, kind):
    found, _ = of_strategy(ranks, kind, "fp16")
    (skipped, *_), norms = found["losses"], [norm for _, norm in found["losses"]]
    assert skipped[1] == 0.0, "a loss of 0.77 overflows at a scale of 2^16"
    assert skipped[0] == pytest.approx(plain_torch()[0][0], rel=2e-3)
    assert all(norm > 0 for norm in norms[1:])


@pytest.mark.parametrize("what", ["-".join(("stage", *what)) for what in STAGES])
def test_stage_runs_on_two_gpus(ranks, what):
    for rank in ranks:
        assert "error" not in rank[what], rank[what]["traceback"]
    metrics = ranks[0][what]["found"]
    assert [line["step"] for line in metrics] == [1, 2]


def test_strategies_train_a_model_alike(ranks):
    zero, fully = (ranks[0][f"stage-sft-{kind}-fp32"]["found"] for kind in ("zero2", "fsdp2"))
    for one, other in zip(zero, fully, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def plain_torch():
    """The oracle: loss and gradient norm of each step, on one CPU and in one micro-batch."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1))
    net[0].bias.requires_grad_(False)
    params = [p for p in net.parameters() if p.requires_grad]
    data = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, 8, 7, generator=data)
    targets = torch.randn(4, 8, generator=data)
    optimizer = torch.optim.AdamW(params)
    found = []
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        loss = (net(inputs[step]).squeeze(1) - targets[step]).square().mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append([loss.item(), norm.item()])
    return found
