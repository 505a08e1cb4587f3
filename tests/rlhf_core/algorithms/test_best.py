"""Stages that are evaluated while they train: which weights they publish, and after a restart."""

import numpy as np
import pytest

from rlhf_core.jobs import DPOJob, GRPOJob, PPOJob, ReinforcePPJob, Resources, RLOOJob, SFTJob
from rlhf_core.training.checkpoint import Checkpointer
from rlhf_core.training.selection import Selection
from tests.rlhf_core.algorithms.stages import weight_hashes

pytestmark = pytest.mark.slow

SMALL = {"precision": "fp32", "schedule": "constant", "warmup_fraction": 0.0}


def place(**settings):
    values = {"micro_batch_size": 16, "checkpoint_every": 1000, "threads": 1, "device": "cpu"}
    return Resources(**(values | settings))


@pytest.fixture
def make(models, data):
    def made(kind=GRPOJob, **settings):
        values = {
            "model": models["llama"], "prompts": data["prompts"], "steps": 8, "max_new_tokens": 6,
            "rewards": [{"type": "length", "target": 4, "width": 4}], "batch_size": 4,
            "learning_rate": 0.03, "missing_eos_penalty": 0.0, "resources": place(), **SMALL,
        }  # fmt: skip
        if kind in (GRPOJob, RLOOJob):
            values["group_size"] = 4
        return kind(**(values | settings))

    return made


@pytest.fixture
def kept(monkeypatch):
    """Step -> the weights after it, of the stage that runs here."""
    found, keep = {}, Selection.keep

    def watched(self, step, total):
        found[step] = {k: v.numpy() for k, v in self.checkpointer.strategy.weights().items()}
        keep(self, step, total)

    monkeypatch.setattr(Selection, "keep", watched)
    return found


class Cut(Exception):
    """The end that was asked for."""


def cut_after(monkeypatch, step):
    """Have a stage end after a step, between two checkpoints."""
    go_on = Checkpointer.after_step

    def after_step(self, done, total, counters=None):
        go_on(self, done, total, counters)
        if done == step:
            self._uploads.wait()
            raise Cut

    monkeypatch.setattr(Checkpointer, "after_step", after_step)


def assert_published(stages, artifact, weights, prefix):
    published = stages.weights(artifact)
    assert published
    for name, value in published.items():
        np.testing.assert_array_equal(value, weights[f"{prefix}{name}"], err_msg=name)


def test_best_evaluation_within_the_budget_is_published_also_after_a_restart(
    stages, make, kept, monkeypatch
):
    common = {"kl_target": 0.5, "kl_coef": 0.2, "kl_horizon": 0.5}
    plain = stages.train_here(make(**common), "best-plain")
    watched = {"eval_every": 2, "eval_prompts": 6, **common}
    last = stages.train_here(make(select="last", **watched), "best-last")
    assert weight_hashes(last) == weight_hashes(plain), "an evaluation changes nothing"
    lines = stages.metrics(last)
    of_rollouts = [{k: v for k, v in x.items() if not k.startswith("heldout_")} for x in lines[1:]]
    assert of_rollouts == stages.metrics(plain)

    # The coefficient follows the KL of the rollout before.
    expected = 0.2
    for line in lines[1:]:
        assert line["kl_coef"] == pytest.approx(expected, rel=1e-12)
        expected *= 1 + np.clip(line["kl"] / 0.5 - 1, -0.2, 0.2) / 0.5
    assert len({line["kl_coef"] for line in lines[1:]}) > 4

    evaluated = [line for line in lines if "heldout_reward" in line]
    assert [line["step"] for line in evaluated] == [0, 2, 4, 6, 8]
    assert abs(evaluated[0]["heldout_kl"]) < 1e-5, "the untrained policy is the reference"
    kls = [line["heldout_kl"] for line in evaluated[1:]]
    budget = (sorted(kls)[1] + sorted(kls)[2]) / 2  # two of four are within
    within = [line for line in evaluated[1:] if line["heldout_kl"] <= budget]
    best = max(within, key=lambda line: line["heldout_reward"])
    assert max(evaluated, key=lambda line: line["heldout_reward"]) not in within or len(within) == 2

    job = make(kl_budget=budget, resources=place(checkpoint_every=3), **watched)
    whole = stages.train_here(job, "best-whole")
    metrics = whole.metadata["metrics"]
    assert metrics["steps"] == best["step"] < 8
    assert metrics["best"] == {"step": best["step"], "by": "heldout_reward", "within": True}
    assert metrics["heldout_kl"] == best["heldout_kl"] <= budget
    assert_published(stages, whole, kept[best["step"]], "policy.model.")
    assert stages.metrics(whole) == lines

    for at in (2, 7):  # before the first checkpoint, and after the best evaluation
        with monkeypatch.context() as patch, pytest.raises(Cut):
            cut_after(patch, at)
            stages.train_here(job, f"best-cut-{at}")
        rest = stages.train_here(job, f"best-cut-{at}", resume=True)
        assert weight_hashes(rest) == weight_hashes(whole)
        assert stages.metrics(rest) == lines, "neither gap nor repetition"
    assert not stages.store.scoped("checkpoints/best-cut-7").list("checkpoint")


def test_stage_without_a_better_evaluation_ends_early_also_after_a_restart(
    stages, make, kept, monkeypatch
):
    settings = {"eval_every": 2, "eval_prompts": 8, "patience": 2, "kl_budget": 1e-6, "steps": 12}
    job = make(resources=place(checkpoint_every=1), **settings)
    artifact = stages.train_here(job, "best-early")
    lines = stages.metrics(artifact)
    kls = {line["step"]: line["heldout_kl"] for line in lines[1:] if "heldout_kl" in line}
    assert min(kls.values()) > 1e-6, "none is within the budget, so the lowest KL counts"
    lowest = min(kls, key=kls.get)
    assert lines[-1]["step"] == lowest + 4 < 12
    assert artifact.metadata["metrics"]["best"]["within"] is False
    assert_published(stages, artifact, kept[lowest], "policy.model.")

    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_after(patch, lowest + 4)  # with a checkpoint, and nothing left to do
        stages.train_here(job, "best-early-cut")
    rest = stages.train_here(job, "best-early-cut", resume=True)
    assert weight_hashes(rest) == weight_hashes(artifact)


KINDS = {"ppo": PPOJob, "grpo": GRPOJob, "rloo": RLOOJob, "reinforce_pp": ReinforcePPJob}


@pytest.mark.parametrize("name", KINDS)
def test_algorithm_trains_with_the_coefficient_that_follows(stages, make, name):
    """The first rollout has no KL; after it the coefficient is nearly 0, or stays."""
    settings = {"steps": 2, "kl_coef": 0.5, "max_new_tokens": 4, "learning_rate": 0.01}
    follows, stays = (
        stages.run_here(make(KINDS[name], **settings, **more), f"best-{name}-{i}")[1]
        for i, more in enumerate([{"kl_target": 1.0, "kl_horizon": 0.201}, {}])
    )
    assert follows[0] == stays[0] and stays[1]["kl_coef"] == 0.5
    assert follows[1]["kl_coef"] == pytest.approx(0.5 * (1 - 0.2 / 0.201))
    assert follows[1]["kl"] == stays[1]["kl"] != 0
    assert follows[1]["grad_norm"] != pytest.approx(stays[1]["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "purpose", "more"),
    [(SFTJob, "sft", {}), (DPOJob, "preference", {"label_smoothing": 0.4})],  # soon over its best
)
def test_lowest_heldout_loss_is_published(stages, models, data, kept, kind, purpose, more):
    job = kind(
        model=models["llama"], data=data[purpose], batch_size=8, epochs=10, max_steps=12,
        learning_rate=0.05, eval_every=1, patience=1, resources=place(), **SMALL, **more,
    )  # fmt: skip
    artifact = stages.train_here(job, f"best-{purpose}")
    losses = [line["heldout_loss"] for line in stages.metrics(artifact)]
    best = int(np.argmin(losses))
    assert len(losses) == best + 2 < 12, losses
    metrics = artifact.metadata["metrics"]
    assert (metrics["steps"], metrics["heldout_loss"]) == (best + 1, losses[best])
    assert_published(stages, artifact, kept[best + 1], "model.")
