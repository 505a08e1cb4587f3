"""Stages in which nothing asks for the KL to the SFT model: the same policy without a reference."""

import pytest

from rlhf_core.jobs import GRPOJob, LoRA, PPOJob
from rlhf_core.jobs.online_dpo import OnlineDPOJob
from tests.rlhf_core.algorithms.test_online import make

__all__ = ["make"]

pytestmark = pytest.mark.slow

DIGESTS = {"model": "a" * 64, "prompts": "b" * 64, "reward_model": "c" * 64}
OF_KL = {"kl", "kl_k3", "kl_loss"}
JOBS = {
    # Rollouts after the first leave their old log-probabilities to the first update; the layers
    # that run once are the policy's alone.
    "grpo": (
        "grpo",
        {
            "trainable_layers": 1,
            "reward_model": None,
            "epochs": 2,
            "rewards": [{"type": "length", "target": 3, "width": 1}],
        },
    ),
    "rloo": ("rloo", {"kl_in": "loss", "lora": LoRA(rank=2, alpha=8), "learning_rate": 1e-2}),
    "ppo": ("ppo", {"batch_size": 8, "ppo_epochs": 2}),
}


@pytest.fixture(scope="module")
def runs(run_plan, make):
    plan = {}
    for name, (algorithm, settings) in JOBS.items():
        for max_kl in (100.0, None):
            job = make(algorithm, kl_coef=0.0, max_kl=max_kl, steps=2, **settings)
            plan[f"{name}-{max_kl}"] = (job, {})
    return run_plan(1, plan)


@pytest.mark.parametrize("name", JOBS)
def test_policy_is_the_same_without_a_reference(runs, name):
    plain, without = runs[f"{name}-100.0"], runs[f"{name}-None"]
    for line, other in zip(plain.metrics, without.metrics, strict=True):
        assert {"kl", "kl_k3"} <= line.keys()
        assert other == {k: v for k, v in line.items() if k not in OF_KL}
    weights = plain.weights()
    assert all((value == weights[key]).all() for key, value in without.weights().items())


def test_reference_is_there_where_somebody_asks_for_the_kl():
    def needed(kind=GRPOJob, **settings):
        return kind(**DIGESTS, **({"kl_coef": 0.0, "max_kl": None} | settings)).needs_reference

    assert not needed() and not needed(PPOJob)
    assert needed(kl_coef=0.01) and needed(max_kl=100.0)
    assert needed(kl_budget=5.0, eval_every=1)
    assert needed(OnlineDPOJob), "its loss is measured from it"
    assert GRPOJob(**DIGESTS, kl_coef=0.0).needs_reference, "max_kl has a default"
