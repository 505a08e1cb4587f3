"""QLoRA: adapters on weights in 4 bits, in whole stages."""

import json

import numpy as np
import pytest
import torch

from rlhf_core.jobs import (
    DPOJob,
    GRPOJob,
    KTOJob,
    ORPOJob,
    PPOJob,
    PretrainJob,
    ReinforcePPJob,
    Resources,
    RewardJob,
    RLOOJob,
    SFTJob,
    SimPOJob,
)
from rlhf_core.models.loading import load_causal_lm, load_scalar_model
from rlhf_core.models.nf4 import NF4, is_quantised
from rlhf_core.training.checkpoint import Checkpointer
from rlhf_core.training.stored_checkpoints import open_saved
from tests.rlhf_core.algorithms.interrupted import Cut
from tests.rlhf_core.algorithms.lora import heldout_loss, make, name_of, outputs
from tests.rlhf_core.algorithms.stages import weight_hashes

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.usefixtures("own_home")

# bf16 keeps 8 bits of a weight: rounding moves it by up to 2^-9, 0.2 %. On the stored model's
# log-probabilities (nats) of these tiny models that is at most 0.01, on a mean over a held-out set
# 0.001: the errors of single weights cancel.
ROUNDING, MEAN_ROUNDING = 0.03, 2e-3
FP32 = NF4(torch.device("cpu"), torch.float32)


def quantised(kind, models, data, random_reward, **settings):
    return make(kind, models, data, random_reward, quantization="nf4", **settings)


def check(stages, job, trained):
    """The stored model, and the quantised base with the stored adapter, say what was trained."""
    artifact = stages.train_here(job, f"nf4-{job.algorithm}-{job.precision}")
    out, base = stages.store.fetch(artifact.digest), stages.store.fetch(job.model)
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config
    (expected,) = trained
    if isinstance(job, RewardJob):
        stored, beside = load_scalar_model(out), load_scalar_model(out)
        backbone = load_causal_lm(base, nf4=FP32).base_model
        expected = (expected - stored.mean) / stored.std  # after training
        beside.backbone = peft.PeftModel.from_pretrained(backbone, out / "adapter").eval()
    else:
        stored, beside = load_causal_lm(out), load_causal_lm(base, nf4=FP32)
        plain = load_causal_lm(base)
        assert (outputs(plain) - expected).abs().max() > 2 * ROUNDING, "nothing was learned"
        beside = peft.PeftModel.from_pretrained(beside, out / "adapter").eval()
    scale = getattr(stored, "std", 1.0)
    torch.testing.assert_close(outputs(stored), expected, atol=ROUNDING / scale, rtol=0)
    torch.testing.assert_close(outputs(beside), expected, atol=1e-4 / scale, rtol=1e-4)
    return artifact


@pytest.mark.parametrize("kind", [SFTJob, RewardJob, DPOJob, PPOJob], ids=name_of)
def test_stage_stores_what_it_trained(stages, models, data, random_reward, trained, kind):
    check(stages, quantised(kind, models, data, random_reward), trained)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [PretrainJob, SimPOJob, ORPOJob, KTOJob, GRPOJob, RLOOJob, ReinforcePPJob],
    ids=name_of,
)
def test_other_stages_store_what_they_trained(stages, models, data, random_reward, trained, kind):
    check(stages, quantised(kind, models, data, random_reward), trained)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stored_model_has_the_loss_that_the_run_reported(
    stages, models, data, random_reward, precision
):
    """The loss that the run reports in bf16 is computed in bf16 too: 0.2 % of each activation."""
    job = quantised(SFTJob, models, data, random_reward, precision=precision, seed=2)
    artifact = stages.train_here(job, f"nf4-loss-{precision}")
    reported = artifact.metadata["metrics"]["heldout_loss"]
    found = heldout_loss(stages.store.fetch(artifact.digest), stages.store.fetch(job.data))
    untrained = heldout_loss(stages.store.fetch(job.model), stages.store.fetch(job.data))
    assert untrained - found > 50 * MEAN_ROUNDING
    np.testing.assert_allclose(
        found, reported, atol=MEAN_ROUNDING * (5 if precision == "bf16" else 1)
    )


def test_all_models_of_ppo_are_quantised_and_the_reference_is_the_policy(
    stages, models, data, random_reward, monkeypatch
):
    from rlhf_core.training.online import stage as online

    seen, load = [], online.load_models

    def watched(*args):
        found = load(*args)
        [reward] = found.reward.members
        whole = (found.trained.policy, found.trained.critic.backbone, reward.backbone)
        seen.extend([*map(is_quantised, whole), found.reference.policy is whole[0]])
        seen.append(found.trained.critic.head.weight.dtype)
        return found

    monkeypatch.setattr(online, "load_models", watched)
    stages.train_here(quantised(PPOJob, models, data, random_reward, seed=3), "nf4-frozen")
    assert seen == [True, True, True, True, torch.float32]


def test_cut_and_resumed_stage_ends_in_the_same_bytes(
    stages, models, data, random_reward, monkeypatch
):
    place = Resources(micro_batch_size=8, threads=1, device="cpu", checkpoint_every=2)
    job = quantised(SFTJob, models, data, random_reward, max_steps=4, resources=place)
    whole = stages.train_here(job, "nf4-whole")
    go_on, stored = Checkpointer.after_step, []

    def cut_after_3(self, done, total, counters=None):
        go_on(self, done, total, counters)
        if done == 3:
            self._uploads.wait()
            checkpoint = max(self._store.list("checkpoint"), key=lambda a: a.metadata["step"])
            stored.append(open_saved(self._store.fetch(checkpoint.digest)).index)
            raise Cut

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(Checkpointer, "after_step", cut_after_3)
        stages.train_here(job, "nf4-cut")
    assert stored[0] and all("lora_" in name for name in stored[0])
    steps = []
    monkeypatch.setattr(
        Checkpointer, "after_step",
        lambda self, done, total, counters=None: steps.append(done) or go_on(self, done, total),
    )  # fmt: skip
    again = stages.train_here(job, "nf4-cut", resume=True)
    assert steps == [3, 4]
    assert weight_hashes(again) == weight_hashes(whole)
