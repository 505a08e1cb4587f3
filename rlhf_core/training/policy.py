"""The language model that a stage trains: setting it up, saving and publishing it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf_core.jobs import (
    OnlineJob,
    PreferenceJob,
    PretrainJob,
    RewardJob,
    SFTJob,
)
from rlhf_core.jobs.best_of_n import RejectionSamplingJob
from rlhf_core.jobs.distillation import DistillJob
from rlhf_core.models.nf4 import NF4
from rlhf_core.models.saving import save_causal_lm
from rlhf_core.nn.layers import choose_trainable
from rlhf_core.nn.modules import Policy
from rlhf_core.runtime.context import StageContext
from rlhf_core.store import Artifact
from rlhf_core.training.checkpoint import Checkpointer
from rlhf_core.training.optimizer import adamw
from rlhf_core.training.strategy import HALF, Strategy

PolicyJob = PretrainJob | SFTJob | RejectionSamplingJob | PreferenceJob | DistillJob | OnlineJob
"""Jobs that train a language model."""


def frozen_storage(
    job: PolicyJob | RewardJob, strategy: Strategy
) -> tuple[torch.dtype, NF4 | None, bool]:
    """How the weights of a model are loaded whose adapters are trained, and those of frozen models
    beside it: arguments of `load_causal_lm`.

    Weights that are trained themselves are always loaded in fp32.
    """
    half = torch.bfloat16 if strategy.precision == "bf16" else torch.float32
    if job.quantization == "nf4":
        return half, NF4(strategy.device, HALF.get(strategy.precision, torch.float32)), False
    # In bf16 they take half the memory, and autograd keeps no second, cast copy of each for the
    # backward pass. ZeRO casts them itself.
    if job.lora is not None and strategy.kind == "ddp" and strategy.device.type == "cuda":
        return half, None, False
    return torch.float32, None, not strategy.loads


def enable_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()  # transformers checkpoints in training mode only; dropout is already off


def new_policy(job: PolicyJob, model: nn.Module) -> Policy:
    """The policy, with the parameters or adapters that the settings train."""
    policy = Policy(choose_trainable(model, job, job.seed))
    if job.resources.gradient_checkpointing:
        enable_checkpointing(policy.model)
    return policy


def prepare_policy(job: PolicyJob, model: nn.Module, strategy: Strategy) -> Policy:
    """`new_policy` with its optimizer, distributed over the ranks; its weights are unchanged."""
    policy = new_policy(job, model)
    strategy.prepare(policy, adamw(policy, job, {"": job.learning_rate}))
    return policy


def save_policy(whole: nn.Module, folder: Path, source: Path) -> None:
    """Write the policy as a Hugging Face folder. Rank 0, once.

    Args:
        whole: of `Strategy.unsharded`: a `Policy`, or a module with one as its `policy`.
        source: folder of the model that it started from.
    """
    save_causal_lm(getattr(whole, "policy", whole).model, folder, source)


def publish_policy(
    job: PolicyJob,
    context: StageContext,
    strategy: Strategy,
    checkpointer: Checkpointer,
    module: nn.Module,
    source: Path,
    metadata: Mapping[str, Any],
) -> Artifact | None:
    """The stage's result: the last weights, or those of the best evaluation. Every rank calls; rank
    0 returns the artifact."""
    if job.selects:
        weights = checkpointer.best_weights() if context.main else {}
    else:
        weights = strategy.weights(keep=context.main)
    whole = strategy.unsharded(module, weights, keep=context.main)
    if not context.main:
        checkpointer.finish()
        return None
    folder = context.scratch("result")
    save_policy(whole, folder, source)
    artifact = context.publish(job, folder, metadata)
    checkpointer.finish()
    return artifact
