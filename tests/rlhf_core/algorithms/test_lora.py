"""Every stage stores the model that it trained, whichever layers have an adapter."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from rlhf_core.algorithms import reward as reward_stage
from rlhf_core.data.dataset.reading import Rows
from rlhf_core.errors import ConfigError
from rlhf_core.jobs import (
    DPOJob,
    GRPOJob,
    KTOJob,
    LoRA,
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
from rlhf_core.nn.modules import Policy
from rlhf_core.training import policy as policy_module

peft = pytest.importorskip("peft")

ONLINE = (PPOJob, GRPOJob, RLOOJob, ReinforcePPJob)
PAIRS = (DPOJob, SimPOJob, ORPOJob)
KINDS = (SFTJob, PretrainJob, RewardJob, *PAIRS, KTOJob, *ONLINE)
TARGETS = (None, "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
           "lm_head", "embed_tokens")  # fmt: skip
NO_HEAD = (RewardJob, PPOJob)  # reward model and critic have no vocabulary head

IDS = torch.arange(3, 43).view(2, 20)
MASK = torch.ones(2, 20, dtype=torch.bool)


def name_of(kind):
    return kind.__name__


def make(kind, models, data, random_reward, target=None, **settings):
    values = {
        "model": models["llama"], "lora": LoRA(rank=2, targets=(target,) if target else None),
        "learning_rate": 0.03, "batch_size": 8, "schedule": "constant", "warmup_fraction": 0.0,
        "precision": "fp32",
        "resources": Resources(micro_batch_size=8, threads=1, device="cpu"),
    }  # fmt: skip
    if kind in ONLINE:
        values |= {"prompts": data["prompts"], "reward_model": random_reward, "steps": 1,
                   "max_new_tokens": 4, "clip_range": 0.9}  # fmt: skip
    else:
        purposes = {SFTJob: "sft", PretrainJob: "pretrain"}
        values |= {"data": data[purposes.get(kind, "preference")], "max_steps": 2}
    if kind is PretrainJob:
        values["length"] = 64
    if kind is RewardJob:
        values |= {"normalization_prompts": 4, "max_new_tokens": 4}
    if kind in (GRPOJob, RLOOJob):
        values |= {"group_size": 2, "batch_size": 4}
    return kind(**(values | settings))


def outputs(model) -> torch.Tensor:
    """Log-probabilities of a language model, scores of a reward model; of fixed rows."""
    loss_mask = MASK.clone()
    loss_mask[:, 0] = False
    with torch.no_grad():
        if hasattr(model, "head"):
            return model(IDS, MASK)
        return Policy(model)(IDS, MASK, loss_mask)


@pytest.fixture(autouse=True)
def home(stages, monkeypatch):
    monkeypatch.setenv("RLHF_HOME", stages.env["RLHF_HOME"])


@pytest.fixture
def trained(monkeypatch):
    """What the trained module says just before it is exported, of each stage that runs here."""
    seen = []
    for place in (policy_module, reward_stage):

        def watched(module, weights, export=place.export):
            whole = getattr(module, "policy", module)
            seen.append(outputs(getattr(whole, "model", whole)))
            return export(module, weights)

        monkeypatch.setattr(place, "export", watched)
    return seen


def check(stages, kind, models, data, random_reward, target, trained):
    job = make(kind, models, data, random_reward, target)
    artifact = stages.train_here(job, f"lora-{job.algorithm}-{target}")
    out, base = stages.store.fetch(artifact.digest), stages.store.fetch(job.model)
    stored = load_scalar_model(out) if kind is RewardJob else load_causal_lm(out)
    (expected,) = trained
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


DIAGONAL = [
    (SFTJob, "lm_head"), (PretrainJob, "embed_tokens"), (RewardJob, "embed_tokens"),
    (DPOJob, "lm_head"), (SimPOJob, "k_proj"), (ORPOJob, "v_proj"), (KTOJob, "o_proj"),
    (PPOJob, "embed_tokens"), (GRPOJob, "lm_head"), (RLOOJob, "up_proj"), (ReinforcePPJob, None),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "target"), DIAGONAL)
def test_stage_stores_what_it_trained(stages, models, data, random_reward, trained, kind, target):
    check(stages, kind, models, data, random_reward, target, trained)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_every_stage_stores_what_it_trained_for_every_target(
    stages, models, data, random_reward, trained, kind, target
):
    if (kind, target) in DIAGONAL or (kind in NO_HEAD and target == "lm_head"):
        pytest.skip("tested above or below")
    check(stages, kind, models, data, random_reward, target, trained)


def heldout_loss(folder: Path, data: Path) -> float:
    """Mean cross-entropy of the trained tokens of the held-out rows, by transformers alone."""
    model, total, tokens = load_causal_lm(folder), 0.0, 0
    rows = Rows(data, "heldout", purpose="sft")
    for row in rows.take(list(range(len(rows)))):
        ids = torch.tensor([row["input_ids"]])
        wanted = torch.tensor(row["trainable"][1:], dtype=torch.bool)
        labels = ids[0, 1:].masked_fill(~wanted, -100)
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        total += float(cross_entropy(logits, labels, reduction="sum"))
        tokens += int((labels >= 0).sum())
    return total / tokens


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
