"""Loads the reward models that a stage scores replies with."""

from __future__ import annotations

import torch

from rlhf_core.jobs.ensemble import EnsembleJob
from rlhf_core.models.loading import load_scalar_model
from rlhf_core.nn.ensemble import RewardEnsemble
from rlhf_core.nn.layers import share_frozen
from rlhf_core.nn.modules import ScalarModel
from rlhf_core.store import Store


def load_ensemble(
    job: EnsembleJob, store: Store, dtype: torch.dtype, device: torch.device
) -> RewardEnsemble | None:
    """The job's frozen reward models on a device, with equal layers shared; None if it has none."""
    members: list[ScalarModel] = []
    for digest in job.reward_models:
        member = load_scalar_model(store.fetch(digest), dtype).requires_grad_(False).to(device)
        members.append(member)
        share_frozen(*members)
    return RewardEnsemble(members, job) if members else None
