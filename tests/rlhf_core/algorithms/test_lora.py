"""Every stage stores the model that it trained, whichever layers have an adapter."""

import numpy as np
import pytest
import torch

from rlhf_core.errors import ConfigError
from rlhf_core.jobs import (
    DPOJob,
    GRPOJob,
    PPOJob,
    RewardJob,
    SFTJob,
)
from rlhf_core.models.loading import load_causal_lm, load_scalar_model
from tests.rlhf_core.algorithms.lora import KINDS, heldout_loss, make, name_of, outputs

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("own_home")

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head",
           "embed_tokens")  # fmt: skip
NO_HEAD = (RewardJob, PPOJob)  # reward model and critic have no vocabulary head


def check(stages, kind, models, data, random_reward, target, trained):
    job = make(kind, models, data, random_reward, target)
    artifact = stages.train_here(job, f"lora-{job.algorithm}-{'every' if target else 'default'}")
    out, base = stages.store.fetch(artifact.digest), stages.store.fetch(job.model)
    stored = load_scalar_model(out) if kind is RewardJob else load_causal_lm(out)
    (expected,) = trained
    if kind is RewardJob:  # it is scaled after training
        expected = (expected - stored.mean) / stored.std
    torch.testing.assert_close(outputs(stored), expected, atol=1e-4, rtol=1e-4)
    beside = load_causal_lm(base)
    if kind is RewardJob:
        before = load_scalar_model(out)
        before.backbone = beside.base_model
        assert (outputs(before) - expected).abs().max() > 1e-4, "nothing was learned"
        before.backbone = peft.PeftModel.from_pretrained(beside.base_model, out / "adapter").eval()
        beside = before
    else:
        assert (outputs(beside) - expected).abs().max() > 1e-4, "nothing was learned"
        beside = peft.PeftModel.from_pretrained(beside, out / "adapter").eval()
    torch.testing.assert_close(outputs(beside), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("which", ["default", "every"])
@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_stage_stores_what_it_trained(stages, models, data, random_reward, trained, kind, which):
    """All targets in one run: were one of them stored wrongly, the outputs would differ.
    (models/test_lora_targets.py has each of them alone.)"""
    every = [t for t in TARGETS if t != "lm_head" or kind not in NO_HEAD]
    target = every if which == "every" else None
    check(stages, kind, models, data, random_reward, target, trained)


@pytest.mark.parametrize("target", ["lm_head", None])
def test_stored_model_has_the_loss_that_the_run_reported(
    stages, models, data, random_reward, target
):
    job = make(SFTJob, models, data, random_reward, target, seed=1)
    artifact = stages.train_here(job, f"lora-loss-{target}")
    found = heldout_loss(stages.store.fetch(artifact.digest), stages.store.fetch(job.data))
    np.testing.assert_allclose(found, artifact.metadata["metrics"]["heldout_loss"], rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "model", "target"),
    [(SFTJob, "qwen2", "lm_head"), (DPOJob, "qwen2", "embed_tokens"),
     (RewardJob, "llama", "lm_head"), (PPOJob, "llama", "lm_head"), (GRPOJob, "llama", "q_porj")],
    ids=str,
)  # fmt: skip
def test_stage_refuses_a_target_that_it_could_not_store(
    stages, models, data, random_reward, kind, model, target
):
    job = make(kind, models, data, random_reward, target, model=models[model])
    with pytest.raises(ConfigError, match=f"targets has '{target}', which .*valid are"):
        stages.train_here(job, f"refused-{kind.__name__}-{target}")
