"""Online stages with an environment: a tiny model learns to ask a calculator."""

from __future__ import annotations

import json

import pytest

from rlhf_core.jobs import (
    BuiltinRollout,
    DataJob,
    GRPOJob,
    ImportModelJob,
    PPOJob,
    ReinforcePPJob,
    Resources,
    RLOOJob,
)
from rlhf_core.runtime.work import without_measurements
from rlhf_core.training.checkpoint import Checkpointer
from tests.rlhf_core.algorithms.stages import weight_hashes
from tests.rlhf_core.environments.sums import make_model, write_prompts

pytestmark = pytest.mark.slow
CLASSES = {"ppo": PPOJob, "grpo": GRPOJob, "rloo": RLOOJob, "reinforce_pp": ReinforcePPJob}


@pytest.fixture(scope="module")
def inputs(stages):
    """Digests of a model that asks in half of its replies, and of prompts."""
    source = make_model(stages.folder / "sums", asks=0.4)
    model = stages.train_here(ImportModelJob(source=str(source)), "sums-model").digest
    path = write_prompts(stages.folder / "sums.jsonl", 120, seed=7)
    data = DataJob(
        purpose="prompts", source=str(path), model=model, heldout_fraction=0.3,
        columns={"prompt": "prompt", "answer": "answer"},
    )  # fmt: skip
    return {"model": model, "prompts": stages.train_here(data, "sums-prompts").digest}


def make(inputs, algorithm="grpo", place=None, **settings):
    values = {
        "steps": 2, "max_new_tokens": 10, "learning_rate": 3e-3, "precision": "fp32",
        "schedule": "constant", "warmup_fraction": 0.0, "batch_size": 16, "kl_coef": 0.0,
        "environment": {"type": "calculator", "announce": False, "max_episode_tokens": 40},
        "rewards": [{"type": "environment"}], "min_length": None,
        "resources": Resources(micro_batch_size=16, checkpoint_every=1, threads=1, **place or {}),
    }  # fmt: skip
    if algorithm in ("grpo", "rloo"):
        values |= {"batch_size": 8, "group_size": 4}
    return CLASSES[algorithm](**inputs, **(values | settings))


def test_policy_learns_to_ask_the_calculator(stages, inputs, own_home):
    job = make(inputs, steps=8, eval_every=8, eval_prompts=32, missing_eos_penalty=0.0)
    _, (before, *steps) = stages.run_here(job, "sums-learns")
    after = steps[-1]
    assert before["heldout_environment_tool_calls"] < 0.5
    assert after["heldout_environment_tool_calls"] > 0.85
    assert before["heldout_reward"] < 0.25 < after["heldout_reward"] - 0.2, (before, after)
    for step in steps:
        assert step["reward_environment"] == step["score"]
        assert step["rollout_logprob_gap"] < 1e-4, "tokens and log-probabilities belong together"
        assert 1 <= step["turns"] <= 1 + step["environment_tool_calls"]
        # <|im_end|>\n<|im_start|>tool\n, one digit or two, <|im_end|>\n<|im_start|>assistant\n
        written = step["environment_tokens"] / (step["turns"] - 1)
        assert 8 <= written <= 9


@pytest.mark.parametrize("algorithm", ("ppo", "rloo", "reinforce_pp"))
def test_other_algorithms_take_turns_too(stages, inputs, own_home, algorithm):
    # Rules read the last reply of an episode, and the KL is that of sampled tokens alone.
    rewards = [{"type": "environment", "weight": 2.0}, {"type": "answer", "match": "numeric"}]
    job = make(inputs, algorithm, kl_coef=0.1, rewards=rewards)
    _, lines = stages.run_here(job, f"sums-{algorithm}")
    for line in lines:
        assert line["reward_answer"] == line["reward_environment"]
        assert line["score"] == pytest.approx(3 * line["reward_environment"])
        assert line["rollout_logprob_gap"] < 1e-4
        assert line["turns"] > 1
    assert abs(lines[0]["kl"]) < 1e-4 < abs(lines[1]["kl"])


class Cut(Exception):
    """The end that was asked for."""


def test_episodes_after_a_cut_are_those_of_a_whole_run(stages, inputs, own_home, monkeypatch):
    """Nothing is lost, and nothing counted twice."""
    job = make(inputs, steps=4, eval_every=2, eval_prompts=8, epochs=2)
    whole = stages.train_here(job, "sums-whole")
    after_step = Checkpointer.after_step

    def cut(self, done, total, counters=None):
        after_step(self, done, total, counters)
        if done == 2:
            self._uploads.wait()
            raise Cut

    monkeypatch.setattr(Checkpointer, "after_step", cut)
    with pytest.raises(Cut):
        stages.train_here(job, "sums-cut")
    monkeypatch.setattr(Checkpointer, "after_step", after_step)
    resumed = stages.train_here(job, "sums-cut", resume=True)
    assert weight_hashes(resumed) == weight_hashes(whole)
    first, second = (
        [without_measurements(line) for line in stages.metrics(artifact)]
        for artifact in (whole, resumed)
    )
    assert first == second
    assert [line["step"] for line in first] == [0, 1, 2, 3, 4]
    assert json.dumps(first).count("environment_tool_calls") >= 4


@pytest.mark.chaos
def test_episodes_of_samplers_beside_the_trainer_are_the_same(stages, inputs, own_home):
    beside = make(inputs, rollout=BuiltinRollout(placement="separate"))
    one, _ = stages.run_here(make(inputs), "sums-colocated")
    two, lines = stages.run_here(beside, "sums-separate")
    assert one == two
    assert lines[0]["turns"] > 1
