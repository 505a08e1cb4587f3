"""Jobs that train adapters, and what their models say."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from rlhf_core.data.dataset.reading import Rows
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
from rlhf_core.models.loading import load_causal_lm
from rlhf_core.nn.modules import Policy

ONLINE = (PPOJob, GRPOJob, RLOOJob, ReinforcePPJob)
PAIRS = (DPOJob, SimPOJob, ORPOJob)
KINDS = (SFTJob, PretrainJob, RewardJob, *PAIRS, KTOJob, *ONLINE)

IDS = torch.arange(3, 43).view(2, 20)
MASK = torch.ones(2, 20, dtype=torch.bool)


def name_of(kind):
    return kind.__name__


def make(kind, models, data, random_reward, target=None, **settings):
    targets = (target,) if isinstance(target, str) else target
    values = {
        "model": models["llama"], "lora": LoRA(rank=2, targets=targets),
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
