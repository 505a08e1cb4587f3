"""Stages whose models are sharded by FSDP2, on real ranks, against one rank that shards nothing."""

import numpy as np
import pytest

from rlhf_core.jobs import (
    GRPOJob,
    KTOJob,
    LoRA,
    PPOJob,
    PretrainJob,
    Resources,
    RewardJob,
    SFTJob,
)
from tests.rlhf_core.algorithms.stages import weight_hashes

pytestmark = pytest.mark.slow

CLASSES = {"sft": SFTJob, "reward": RewardJob, "kto": KTOJob, "pretrain": PretrainJob,
           "ppo": PPOJob, "grpo": GRPOJob}  # fmt: skip
VARIANTS = {
    "sft": {},
    "sft-adapters": {"lora": LoRA(rank=2, alpha=8), "learning_rate": 1e-2},
    "pretrain": {},
    "reward": {"head": "probe"},
    "kto": {},
    "ppo": {"ppo_epochs": 2, "minibatches": 2, "ptx_coef": 2.0},
    "grpo": {"kl_coef": 0.1, "minibatches": 2},
    "grpo-adapters": {"lora": LoRA(rank=2, alpha=8), "learning_rate": 1e-2, "kl_coef": 0.1},
}
UNSTEADY = "accuracy"  # not the same by rounding: on which side of 0 a log-ratio of nearly 0 is
CHECKPOINTED = ("sft-adapters", "reward", "grpo")
NAMES = tuple(VARIANTS)


@pytest.fixture(scope="module")
def make(models, data, random_reward):
    """Name of a variant, strategy -> job."""
    online = {"reward_model": random_reward, "prompts": data["prompts"], "steps": 3,
              "max_new_tokens": 6}  # fmt: skip
    shared = {
        "sft": {"data": data["sft"], "batch_size": 8, "max_steps": 3},
        "pretrain": {"data": data["pretrain"], "batch_size": 12, "length": 48, "max_steps": 2},
        "reward": {"data": data["preference"], "batch_size": 8, "max_steps": 3,
                   "normalization_prompts": 15, "max_new_tokens": 6},
        "kto": {"data": data["unpaired"], "batch_size": 8, "max_steps": 2},
        "ppo": {**online, "batch_size": 16, "ptx": data["sft"]},
        "grpo": {**online, "batch_size": 4, "group_size": 4},
    }  # fmt: skip

    def made(name, strategy="fsdp2", **settings):
        algorithm = name.partition("-")[0]
        place = {
            "micro_batch_size": 4, "threads": 1, "strategy": strategy,
            "checkpoint_every": settings.pop("checkpoint_every", 1000),
            "gradient_checkpointing": strategy == "fsdp2" and name in CHECKPOINTED,
        }  # fmt: skip
        values = {
            "model": models["llama"], "learning_rate": 1e-3, "precision": "fp32",
            "schedule": "constant", "warmup_fraction": 0.0, "resources": Resources(**place),
            **shared[algorithm], **VARIANTS[name],
        }  # fmt: skip
        return CLASSES[algorithm](**(values | settings))

    return made


@pytest.fixture(scope="module")
def plain(run_plan, make):
    """One rank, ddp; and fsdp2 on it."""
    plan = {name: (make(name, "ddp"), {}) for name in NAMES}
    return run_plan(1, plan | {"sft-alone": (make("sft"), {})})


@pytest.fixture(scope="module")
def two(run_plan, make):
    plan = {name: (make(name), {}) for name in NAMES}
    plan["grpo-by-layer"] = (make("grpo"), {"gather_share": 0.0})
    plan["sft-bf16"] = (make("sft", precision="bf16"), {})
    plan["ppo-bf16"] = (make("ppo", precision="bf16"), {})
    for name in ("sft", "ppo"):
        plan[f"{name}-half"] = (make(name), {"where": f"{name}-cut", "stop_after": 2})
        plan[f"{name}-rest"] = (make(name), {"where": f"{name}-cut"})
    return run_plan(2, plan)


@pytest.fixture(scope="module")
def four(run_plan, make):
    return run_plan(4, {"reward": (make("reward"), {})})


def assert_same(run, plain, rtol, atol=1e-4):
    for line, other in zip(run.metrics, plain.metrics, strict=True):
        assert line.keys() == other.keys()
        for name, value in other.items():
            if name != UNSTEADY:
                np.testing.assert_allclose(line[name], value, rtol, atol, err_msg=name)


def assert_same_weights(run, plain, atol):
    others = plain.weights()
    for name, value in run.weights().items():
        np.testing.assert_allclose(value, others[name], atol=atol, err_msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_compute_what_one_does(two, plain, name):
    assert_same(two[name], plain[name], rtol=1e-4)
    assert_same_weights(two[name], plain[name], atol=1e-5)


def test_four_ranks_compute_what_one_does(four, plain):
    assert_same(four["reward"], plain["reward"], rtol=1e-4)
    assert_same_weights(four["reward"], plain["reward"], atol=1e-5)


def test_one_rank_computes_what_it_does_without_sharding(plain):
    assert_same(plain["sft-alone"], plain["sft"], rtol=1e-4)
    assert_same_weights(plain["sft-alone"], plain["sft"], atol=1e-5)


@pytest.mark.parametrize("name", ("sft", "ppo"))
def test_bf16_stays_near_fp32(two, plain, name):
    run, other = two[f"{name}-bf16"], plain[name]
    key = "loss" if name == "sft" else "ptx_loss"
    found, want = ([line[key] for line in r.metrics] for r in (run, other))
    np.testing.assert_allclose(found, want, rtol=5e-3)
    assert_same_weights(run, other, atol=2e-2)
    assert run.metrics[0].get("rollout_logprob_gap", 0.0) < 0.05


def test_rollout_by_layer_samples_what_a_gathered_policy_does(two):
    gathered, by_layer = two["grpo"], two["grpo-by-layer"]
    assert weight_hashes(gathered.artifact) == weight_hashes(by_layer.artifact)


@pytest.mark.parametrize("name", ("sft", "ppo"))
def test_resumed_run_ends_in_the_same_artifact(two, name):
    whole, half, rest = (two[f"{name}{part}"] for part in ("", "-half", "-rest"))
    assert "the checkpoint after step 2" in half.said
    assert whole.artifact.digest == rest.artifact.digest
