"""Samplers that compute something else than the trainer: found, or corrected."""

import importlib
import math

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from rlhf_core.errors import TrainingFailure
from rlhf_core.jobs import BuiltinRollout, GRPOJob, Resources, RLOOJob, RolloutCorrection
from rlhf_core.training.online import sampling, updates
from tests.rlhf_core.algorithms.stages import weight_hashes

pytestmark = pytest.mark.slow

CAP = 1.01


@pytest.fixture
def make(models, data):
    def made(kind=GRPOJob, **settings):
        values = {
            "model": models["llama"], "prompts": data["prompts"], "steps": 2, "max_new_tokens": 6,
            "rewards": [{"type": "length", "target": 4, "width": 4}], "batch_size": 4,
            "group_size": 4, "learning_rate": 3e-3, "precision": "fp32",
            "missing_eos_penalty": 0.0,
            "resources": Resources(micro_batch_size=8, threads=1, device="cpu", fast_paths=False),
        }  # fmt: skip
        return kind(**(values | settings))

    return made


def test_changed_cache_of_keys_and_values_ends_the_stage(stages, make, monkeypatch):
    """As a release of transformers might change it: here values of new tokens are halved."""
    update = DynamicLayer.update

    def halved(self, keys, values, *rest, **options):
        all_keys, all_values = update(self, keys, values, *rest, **options)
        return all_keys, all_values * 0.5 if keys.shape[2] == 1 else all_values

    monkeypatch.setattr(DynamicLayer, "update", halved)
    with pytest.raises(TrainingFailure, match=r"built-in sampling loop .*grpo\.rollout\.max_log"):
        stages.train_here(make(), "changed-cache")


@pytest.fixture
def other_sampler(monkeypatch):
    """Replies come from a policy whose weights are off by a twentieth."""
    roll_out = sampling.roll_out

    @torch.no_grad()
    def perturbed(job, strategy, policy, *rest):
        generator = torch.Generator().manual_seed(1)
        weights = {p: p.clone() for p in policy.parameters()}
        for p in weights:
            p += 0.2 * p.std() * torch.randn(p.shape, generator=generator) if p.dim() > 1 else 0.0
        try:
            return roll_out(job, strategy, policy, *rest)
        finally:
            for p, before in weights.items():
                p.copy_(before)

    monkeypatch.setattr(sampling, "roll_out", perturbed)


@pytest.fixture
def watched(monkeypatch):
    """Micro-batches with the indices of their replies, and experiences, of the stage run here."""
    batches, experiences = [], []
    forward = updates.forward_micro_batch

    def forwarded(stage, experience, targets, first_pass, indices, *rest):
        found = forward(stage, experience, targets, first_pass, indices, *rest)
        batches.append((indices, found[0]))
        return found

    monkeypatch.setattr(updates, "forward_micro_batch", forwarded)
    for name in ("grpo", "rloo"):
        module = importlib.import_module(f"rlhf_core.algorithms.{name}")

        def report(stage, step, experience, update, report=module.report_and_save):
            experiences.append(experience)
            report(stage, step, experience, update)

        monkeypatch.setattr(module, "report_and_save", report)
    return batches, experiences


@pytest.mark.parametrize("kind", [GRPOJob, RLOOJob])
def test_replies_of_another_sampler_are_weighted(stages, make, kind, other_sampler, watched):
    batches, experiences = watched
    correction = RolloutCorrection(max_weight=CAP)
    job = make(kind, rollout=BuiltinRollout(max_logprob_gap=1.0, correction=correction))
    artifact = stages.train_here(job, f"corrected-{job.algorithm}")
    lines = stages.metrics(artifact)
    assert len(batches) == 2 * len(experiences) == 4, "two micro-batches of each rollout"
    for step, (experience, line) in enumerate(zip(experiences, lines, strict=True)):
        # One float at a time, from the old log-probabilities as they are after the update.
        rows = []
        for old, sampler, mask in zip(
            experience.old_logprobs.tolist(), experience.rollout_logprobs.tolist(),
            experience.response_mask.tolist(), strict=True,
        ):  # fmt: skip
            ratios = [math.exp(o - s) for o, s, m in zip(old, sampler, mask, strict=True) if m]
            rows.append([math.prod(ratios)] if kind is RLOOJob else ratios)
        for indices, batch in batches[2 * step : 2 * step + 2]:
            for index, found in zip(indices, batch.weights.tolist(), strict=True):
                found = [found] if kind is RLOOJob else found[: len(rows[index])]
                assert found == pytest.approx([min(r, CAP) for r in rows[index]], rel=1e-5)
        flat = [ratio for row in rows for ratio in row]
        assert 0 < line["rollout_weight_outside"] < 1, "the bound is tried"
        assert line["rollout_weight_outside"] == pytest.approx(
            sum(ratio > CAP for ratio in flat) / len(flat)
        )
        assert line["rollout_weight_mean"] == pytest.approx(sum(flat) / len(flat), rel=1e-5)
        assert line["rollout_kl"] > 0
        assert line["rollout_gap_max"] > line["rollout_logprob_gap"] > 1e-3
    if kind is GRPOJob:
        plain = make(kind, rollout=BuiltinRollout(max_logprob_gap=1.0))
        plain_artifact = stages.train_here(plain, "not-corrected")
        assert weight_hashes(plain_artifact) != weight_hashes(artifact)
        assert "rollout_weight_mean" not in stages.metrics(plain_artifact)[0]
