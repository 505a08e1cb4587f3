"""How a rollout gathers a sharded policy: what decides, and what is said.

Both ways on real ranks: tests/rlhf_core/algorithms/test_fsdp2.py.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rlhf_core.nn.modules import Policy
from rlhf_core.rollout import sharded


@pytest.fixture
def policy(monkeypatch):
    monkeypatch.setattr(sharded, "_said", set())
    return Policy(nn.Linear(8, 16, bias=False))  # 512 bytes in fp32


def ranks(*free, rank=0):
    """A group whose ranks have so many free bytes."""
    return SimpleNamespace(rank=rank, device=torch.device("cpu"), gather=lambda mine: list(free))


@pytest.mark.parametrize(("free", "fit"), [((1024, 9999), True), ((9999, 1023), False)])
def test_the_rank_with_the_least_free_memory_decides_for_all(policy, free, fit):
    assert sharded.fits(policy, ranks(*free)) is fit


def test_half_precision_takes_half_the_memory(policy):
    policy.gathered_dtype = torch.bfloat16
    assert sharded.fits(policy, ranks(512))


def test_rank_0_says_once_how_the_policy_is_gathered(policy, capsys):
    for group in (ranks(9999), ranks(9999), ranks(9999, rank=1)):
        sharded.fits(policy, group)
    said = capsys.readouterr().out
    assert said.count("gather the policy once per rollout") == 1
    sharded.fits(policy, ranks(10))
    assert "layer by layer for each token" in capsys.readouterr().out


def test_a_rank_s_share_of_main_memory_is_what_its_machine_s_ranks_leave(monkeypatch):
    alone = sharded.free_memory(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert sharded.free_memory(torch.device("cpu")) == pytest.approx(alone / 4, rel=0.2)
