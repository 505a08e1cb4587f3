"""Online DPO on real ranks: it learns what the judge prefers, the same on any ranks."""

import numpy as np
import pytest

from rlhf_core.jobs import LoRA, Resources
from rlhf_core.jobs.online_dpo import OnlineDPOJob

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def make(models, data):
    def made(strategy="ddp", **settings):
        place = {"micro_batch_size": 4, "threads": 1, "strategy": strategy, "device": "cpu",
                 "checkpoint_every": 1000}  # fmt: skip
        values = {
            "model": models["llama"], "prompts": data["prompts"], "steps": 3, "max_new_tokens": 6,
            "rewards": [{"type": "length", "target": 1, "width": 4}], "min_length": None,
            "batch_size": 8, "learning_rate": 1e-3, "precision": "fp32", "beta": 0.1,
            "missing_eos_penalty": 0.0, "schedule": "constant", "warmup_fraction": 0.0,
            "resources": Resources(**place),
        }  # fmt: skip
        return OnlineDPOJob(**(values | settings))

    return made


@pytest.fixture(scope="module")
def learned(run_plan, make, random_reward):
    """Against a reward model with a random head: it never scores two alike."""
    settings = {"steps": 24, "batch_size": 32, "learning_rate": 2e-2,
                "rewards": [{"type": "model"}], "reward_model": random_reward}  # fmt: skip
    return run_plan(1, {loss: (make(**settings, loss=loss), {}) for loss in ("sigmoid", "ipo")})


@pytest.fixture(scope="module")
def one(run_plan, make):
    plan = {
        "plain": (make(), {}),
        "lora": (make(lora=LoRA(rank=2, alpha=8)), {}),
        "half": (make(), {"where": "cut", "stop_after": 2}),
        "rest": (make(), {"where": "cut"}),
    }
    return run_plan(1, plan)


@pytest.fixture(scope="module")
def two(run_plan, make):
    return run_plan(2, {kind: (make(kind), {}) for kind in ("ddp", "zero2", "fsdp2")})


@pytest.mark.long
@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_policy_learns_what_the_judge_prefers(learned, loss):
    lines = learned[loss].metrics
    scores, margins = ([line[key] for line in lines] for key in ("score", "margin"))
    gain = np.mean(scores[-8:]) - np.mean(scores[:4])
    assert gain > 0.15, f"{gain:.3f} {np.round(scores, 2).tolist()}"
    assert np.mean(margins[-8:]) > 0.02, margins


@pytest.mark.parametrize("name", ["plain", "lora"])
def test_policy_starts_at_the_reference_and_leaves_it(one, name):
    margins = [line["margin"] for line in one[name].metrics]
    assert margins[0] == pytest.approx(0.0, abs=1e-6)
    assert abs(margins[-1]) > 1e-6


@pytest.mark.parametrize("kind", ["ddp", "zero2", "fsdp2"])
def test_two_ranks_compute_what_one_does(one, two, kind):
    for line, other in zip(two[kind].metrics, one["plain"].metrics, strict=True):
        assert line.keys() == other.keys()
        for name, value in other.items():
            if name != "accuracy":  # of margins near 0 rounding decides
                np.testing.assert_allclose(line[name], value, 1e-4, 1e-4, err_msg=name)
    others = one["plain"].weights()
    for name, value in two[kind].weights().items():
        np.testing.assert_allclose(value, others[name], atol=2e-5, err_msg=name)


def test_resumed_run_ends_in_the_same_artifact(one):
    assert "the checkpoint after step 2" in one["half"].said
    assert one["rest"].artifact.digest == one["plain"].artifact.digest
