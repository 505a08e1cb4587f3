"""What scoring a rollout and its first update both need is computed once, to the same bytes."""

import importlib

import pytest

from rlhf_core.errors import TrainingFailure
from rlhf_core.jobs import GRPOJob, PPOJob, ReinforcePPJob, Resources, RLOOJob
from rlhf_core.nn import modules
from rlhf_core.training.online import experience, updates

pytestmark = pytest.mark.slow

ROLLOUTS = 2


@pytest.fixture(scope="module")
def inputs(models, data, random_reward):
    return {
        "model": models["llama"], "reward_model": random_reward, "prompts": data["prompts"],
    }  # fmt: skip


def make(kind, inputs, **settings):
    values = {
        **inputs, "steps": ROLLOUTS, "max_new_tokens": 6, "learning_rate": 1e-3, "batch_size": 4,
        "precision": "fp32", "resources": Resources(micro_batch_size=2, device="cpu", threads=1),
    }  # fmt: skip
    if kind in (GRPOJob, RLOOJob):
        values["group_size"] = 2
    return kind(**(values | settings))


@pytest.fixture
def rows(monkeypatch):
    """Rows of each pass over what is trained."""
    found = []
    for kind in (modules.Actor, modules.ActorCritic):
        forward = kind.forward

        def watched(self, input_ids, *rest, forward=forward):
            found.append(len(input_ids))
            return forward(self, input_ids, *rest)

        monkeypatch.setattr(kind, "forward", watched)
    return found


# kind, settings, rows whose second pass is saved in each rollout but the first
VARIANTS = {
    "grpo": (GRPOJob, {"precision": "bf16"}, 8),
    "grpo-minibatches": (GRPOJob, {"minibatches": 2, "epochs": 2}, 4),
    "grpo-top": (GRPOJob, {"trainable_layers": 1}, 8),
    "rloo": (RLOOJob, {"kl_coef": 0.0}, 8),
    "rloo-kl": (RLOOJob, {"kl_coef": 0.1}, 0),
    "reinforce_pp": (ReinforcePPJob, {"kl_coef": 0.0}, 4),
    "reinforce_pp-kl": (ReinforcePPJob, {"kl_coef": 0.1}, 0),
    "ppo": (PPOJob, {"ppo_epochs": 2, "minibatches": 2, "batch_size": 8}, 0),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_training_ends_in_the_same_bytes(inputs, name, rows, stages, monkeypatch):
    """The first rollout is scored whole; later ones only where it is needed."""
    kind, settings, saved = VARIANTS[name]
    job = make(kind, inputs, **settings)
    found = stages.run_here(job, f"first-update-{name}")
    fewer = sum(rows)
    rows.clear()
    module = importlib.import_module(job.module)
    whole = module.score
    monkeypatch.setattr(module, "score", lambda *arguments, **_: whole(*arguments))
    assert stages.run_here(job, f"first-update-{name}-whole") == found
    assert (sum(rows) - fewer) / (ROLLOUTS - 1) == saved


def test_text_that_is_mixed_in_goes_through_with_its_replies(inputs, data, stages):
    """It shares the pass of the update to which the old log-probabilities were left."""
    job = make(GRPOJob, inputs, ptx=data["sft"], ptx_coef=1.0)
    _, lines = stages.run_here(job, "first-update-mixed-in")
    assert all(line["ptx_loss"] > 0 for line in lines)


def test_replies_of_another_policy_are_found_in_the_first_update(inputs, stages, monkeypatch):
    """An engine whose weights are old, say: before the weights change."""
    job = make(GRPOJob, inputs)  # in fp32: in bf16 replies and scores differ by more
    judge, judged = experience.assert_same_policy, []

    def watched(job, found, precision):
        judge(job, found, precision)
        judged.append(experience.logprob_gap(found))
        if len(judged) == 2:
            raise TrainingFailure("another policy")

    for module in (experience, updates):
        monkeypatch.setattr(module, "assert_same_policy", watched)
    with pytest.raises(TrainingFailure, match="another policy"):
        stages.run_here(job, "first-update-other-policy")
    assert max(judged) < 1e-4, "the log-probabilities are there when they are judged"
