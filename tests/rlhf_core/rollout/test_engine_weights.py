"""What an inference engine is handed: the weights of a policy under their names in a checkpoint.

With vLLM itself: test_vllm_engine.py, and tests/rlhf_core/algorithms/test_vllm.py on several ranks.
"""

import pytest
import torch

from rlhf_core.jobs import LoRA, Resources, SFTSettings
from rlhf_core.models.loading import load_causal_lm
from rlhf_core.nn.layers import choose_trainable
from rlhf_core.nn.modules import Policy
from rlhf_core.rollout.engine_weights import policy_weights
from rlhf_core.training.strategy import Strategy
from tests.rlhf_core.tiny_models import copy_of

ADAPTERS = LoRA(rank=2, alpha=8)


@pytest.fixture(scope="module")
def strategies():
    """precision -> fsdp2 on the only rank, where parameters are spread as over many."""
    place = Resources(device="cpu", threads=1, strategy="fsdp2")
    yield {precision: Strategy(place, precision, 1.0) for precision in ("fp32", "bf16")}
    torch.distributed.destroy_process_group()


@pytest.fixture
def policy_of(tmp_path):
    def made(architecture, settings):
        folder = copy_of(architecture, tmp_path / architecture)
        model = choose_trainable(load_causal_lm(folder), settings, 0)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for param in model.parameters():  # adapters too begin with 0
                param += 0.1 * torch.randn(param.shape, generator=generator)
        return Policy(model)

    return made


def trained(strategy, policy):
    params = [p for p in policy.parameters() if p.requires_grad]
    strategy.prepare(policy, torch.optim.AdamW(params, lr=0.1))
    return params


@pytest.mark.parametrize("settings", [SFTSettings(), SFTSettings(lora=ADAPTERS)])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # gpt2: a tied head, and Conv1D
def test_weights_of_a_sharded_policy_are_those_of_the_whole_one(
    policy_of, strategies, architecture, settings
):
    policy = policy_of(architecture, settings)
    expected = {name: w.clone() for name, w in policy_weights(policy.model)}
    trained(strategies["fp32"], policy)
    found = dict(policy_weights(policy))  # all at once: none is gone with its layer
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert torch.equal(weight, expected[name]), name
    assert all(hasattr(p, "full_tensor") for p in policy.parameters()), "spread again"


def test_weights_are_those_after_a_step_and_a_pass(policy_of, strategies):
    policy, strategy = policy_of("llama", SFTSettings()), strategies["fp32"]
    before = {name: w.clone() for name, w in policy_weights(policy.model)}
    trained(strategy, policy)
    ids = torch.arange(5, 25).view(2, 10)
    mask = torch.ones_like(ids, dtype=torch.bool)
    wanted = mask.clone()
    wanted[:, 0] = False
    with strategy.micro_batch(last=True):
        strategy.backward(policy(ids, mask, wanted).mean())
    strategy.step()
    with torch.no_grad():
        policy(ids, mask, wanted)
    found = dict(policy_weights(policy))
    whole = {name: p.full_tensor() for name, p in policy.model.named_parameters()}
    assert found.keys() == whole.keys() == before.keys()
    for name, weight in found.items():
        assert torch.equal(weight, whole[name]) and not torch.equal(weight, before[name]), name


def test_sharded_weights_come_in_the_precision_of_the_passes(policy_of, strategies):
    policy = policy_of("llama", SFTSettings())
    expected = {name: w.bfloat16() for name, w in policy_weights(policy.model)}
    trained(strategies["bf16"], policy)
    for name, weight in policy_weights(policy):
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, expected[name]), name
