"""The first update of a rollout finds the old log-probabilities of its rows: one pass less, and the
same training to the last bit."""

import importlib

import pytest
import torch

from rlhf_core.context import StageContext
from rlhf_core.errors import TrainingFailure
from rlhf_core.jobs import GRPOJob, ReinforcePPJob, Resources, RLOOJob
from rlhf_core.train import experience, online
from tests.rlhf_core.train.stages import weight_hashes

pytestmark = pytest.mark.slow

TIMES = ("time", "rollout_seconds", "tokens_per_second")
ROLLOUTS = 3


def make(kind, models, data, random_reward, **settings):
    values = {
        "model": models["llama"], "reward_model": random_reward, "prompts": data["prompts"],
        "steps": ROLLOUTS, "max_new_tokens": 6, "learning_rate": 1e-3, "batch_size": 4,
        "resources": Resources(micro_batch_size=2, device="cpu"),
    }  # fmt: skip
    if kind is not ReinforcePPJob:
        values["group_size"] = 2
    return kind(**(values | settings))


@pytest.fixture
def passes(monkeypatch):
    """Rows of each pass over the policy without a gradient."""
    found = []
    forward = online.Actor.forward

    def watched(self, input_ids, *rest):
        if not torch.is_grad_enabled():
            found.append(len(input_ids))
        return forward(self, input_ids, *rest)

    monkeypatch.setattr(online.Actor, "forward", watched)
    return found


@pytest.fixture
def train(stages, tmp_path):
    def run(job, name):
        folder = tmp_path / name
        folder.mkdir()
        context = StageContext(store=stages.store, key=f"first-update-{name}", folder=folder)
        artifact = importlib.import_module(job.module).run(job, context)
        lines = [{k: v for k, v in m.items() if k not in TIMES} for m in context.read_metrics()]
        return weight_hashes(artifact), lines

    return run


VARIANTS = {
    "grpo": (GRPOJob, {}, 8, 0),
    "grpo-minibatches": (GRPOJob, {"minibatches": 2, "epochs": 2}, 8, 4),
    "grpo-top": (GRPOJob, {"trainable_layers": 1}, 8, 0),
    "rloo": (RLOOJob, {"kl_coef": 0.0}, 8, 0),
    "reinforce_pp": (ReinforcePPJob, {"kl_coef": 0.0}, 4, 0),
    "rloo-kl": (RLOOJob, {"kl_coef": 0.1}, 8, 8),
    "reinforce_pp-kl": (ReinforcePPJob, {"kl_coef": 0.1}, 4, 4),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_training_ends_in_the_same_bytes(
    models, data, random_reward, name, passes, train, monkeypatch
):
    """The first rollout is scored whole; later ones only where it is needed."""
    kind, settings, replies, later = VARIANTS[name]
    job = make(kind, models, data, random_reward, **settings)
    found = train(job, name)
    assert sum(passes) == replies + (ROLLOUTS - 1) * later
    passes.clear()
    module = importlib.import_module(job.module)
    whole = module.score
    monkeypatch.setattr(module, "score", lambda *a, late: whole(*a, late=False))
    assert train(job, f"{name}-whole") == found
    assert sum(passes) == ROLLOUTS * replies


def test_replies_of_another_policy_are_found_in_the_first_update(
    models, data, random_reward, train, monkeypatch
):
    """An engine whose weights are old, say: before the weights change."""
    job = make(GRPOJob, models, data, random_reward)
    judge, judged = experience.assert_same_policy, []

    def watched(job, found):
        judge(job, found)
        judged.append(experience.logprob_gap(found))
        if len(judged) == 2:
            raise TrainingFailure("another policy")

    monkeypatch.setattr(experience, "assert_same_policy", watched)
    with pytest.raises(TrainingFailure, match="another policy"):
        train(job, "other-policy")
    assert max(judged) < 1e-4, "the log-probabilities are there when they are judged"
