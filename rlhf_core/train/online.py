"""What PPO, GRPO, RLOO and REINFORCE++ share beside the rollout: models, micro-batches, the end.

b rows of a micro-batch, S positions, T response positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_core.batching import mark_from, split_batch
from rlhf_core.checkpoint import Checkpointer
from rlhf_core.context import StageContext
from rlhf_core.data.reading import Rows
from rlhf_core.data.tokenizer import load_tokenizer
from rlhf_core.jobs import ModelReward, OnlineJob
from rlhf_core.models import (
    ActorCritic,
    Policy,
    ScalarModel,
    load_causal_lm,
    load_scalar_model,
    share_frozen,
)
from rlhf_core.remote_code import is_trusted
from rlhf_core.rewards import Rules
from rlhf_core.store import Artifact
from rlhf_core.strategy import HALF, Strategy
from rlhf_core.train.policy import publish_policy
from rlhf_core.trunk import Trunk, find_trunk

Batch = tuple[Tensor, Tensor, Tensor]  # input_ids (b,S), mask (b,S) bool, marked (b,S) bool


class Actor(nn.Module):
    """A policy that is trained without a critic; called as `ActorCritic` is."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    def forward(
        self,
        input_ids: Tensor,
        mask: Tensor,
        marked: Tensor,
        temperature: float = 1.0,
        ptx: Batch | None = None,
    ) -> tuple[Tensor, None, Tensor | None]:
        """Log-probabilities (b,S) of the marked tokens, no values, and those of ptx or None."""
        logprobs = self.policy(input_ids, mask, marked, temperature)
        return logprobs, None, None if ptx is None else self.policy(*ptx)


class AdapterOff:
    """The reference of a policy that trains adapters: the policy itself without them."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    @torch.no_grad()
    def __call__(
        self, input_ids: Tensor, mask: Tensor, marked: Tensor, temperature: float = 1.0
    ) -> Tensor:
        with self.policy.model.disable_adapter():  # type: ignore[operator]
            return self.policy(input_ids, mask, marked, temperature)


@dataclass
class Models:
    """`trained` trains, all else is frozen; reward is None when all rewards are rules."""

    trained: ActorCritic | Actor
    reference: Policy | AdapterOff
    reward: ScalarModel | None
    rules: Rules
    weights: dict[str, float]  # of each reward, by name
    tokenizer: Any  # None on ranks that decode nothing
    trunk: Trunk | None = None  # of all of them, see `share_trunk`


# ------------------------------------------------------------------------------------- loading


def load_models(
    job: OnlineJob,
    strategy: Strategy,
    source: Path,
    trained: ActorCritic | Actor,
    context: StageContext,
) -> Models:
    """Reference and reward beside the trained module, which is on its device already."""
    # ZeRO and Gemini hold trained weights in half precision; the frozen models then do as well,
    # so that reference and policy start from the same numbers.
    half = strategy.kind != "ddp" and job.precision != "fp32"
    dtype = HALF[job.precision] if half else torch.float32
    # One after another: the peak is then what is kept, not several whole models.
    saved = share_frozen(trained)
    reference: Policy | AdapterOff = AdapterOff(trained.policy)
    frozen: list[nn.Module] = []
    if job.lora is None:
        reference = Policy(load_causal_lm(source, dtype)).requires_grad_(False)
        frozen.append(reference.to(strategy.device))
        saved += share_frozen(trained, *frozen)
    reward = None
    if job.wants_reward_model:
        assert job.reward_model is not None
        folder = context.store.fetch(job.reward_model)
        reward = load_scalar_model(folder, dtype).requires_grad_(False)
        frozen.append(reward.to(strategy.device))
        saved += share_frozen(trained, *frozen)
    if saved:
        context.log(f"frozen layers shared between the models: {saved / 2**20:.0f} MiB saved")
    rules = Rules(job.rewards, job.seed)
    weights = dict(zip(rules.names, rules.weights, strict=True))
    weights["model"] = sum(r.weight for r in job.rewards if isinstance(r, ModelReward))
    # Rank 0 shows replies to people; rules read them on every rank.
    reads = context.main or bool(rules.names)
    tokenizer = load_tokenizer(source, is_trusted(source)) if reads else None
    return Models(trained, reference, reward, rules, weights, tokenizer)


def share_trunk(job: OnlineJob, strategy: Strategy, models: Models, context: StageContext) -> None:
    """Let the models run the layers once that they have in common. After `strategy.prepare`.

    Not with text that is mixed in, which goes through the policy alone and in the same pass.
    """
    if job.trainable_layers is None or strategy.kind == "gemini" or job.ptx_coef > 0:
        return
    assert isinstance(models.reference, Policy)  # adapters and trainable layers exclude each other
    whole: list[nn.Module] = [models.trained.policy.model, models.reference.model]
    if isinstance(models.trained, ActorCritic):
        whole.append(models.trained.critic.backbone)
    if models.reward is not None:
        whole.append(models.reward.backbone)
    models.trunk = find_trunk(whole)
    if models.trunk is not None:
        context.log(f"the lower {models.trunk.depth} layers run once for all {len(whole)} models")


def load_ptx(job: OnlineJob, context: StageContext) -> Rows | None:
    """Rows of the language-modelling loss that is mixed in, if any is."""
    if job.ptx is None or job.ptx_coef == 0:
        return None
    return Rows(context.store.fetch(job.ptx), "train", purpose=("sft", "pretrain"))


# --------------------------------------------------------------------------------- micro-batches


def split_minibatches(replies: int, minibatches: int) -> list[list[int]]:
    """Row numbers of a rollout, dealt out in turn."""
    return [list(range(i, replies, minibatches)) for i in range(minibatches)]


def micro_batches(
    job: OnlineJob, strategy: Strategy, sequences: Sequence[list[int]], minibatches: list[list[int]]
) -> list[list[int]]:
    """This rank's micro-batches, as row numbers of the rollout, minibatch after minibatch."""
    result = []
    for rows in minibatches:
        for positions in split_batch(
            [len(sequences[r]) for r in rows],
            strategy.rank, strategy.world_size, job.resources.micro_batch_size, strategy.padding,
        ):  # fmt: skip
            result.append([rows[p] for p in positions])
    return result


def collate_responses(
    sequences: Sequence[list[int]],
    prompt_lengths: Sequence[int],
    positions: Sequence[int],
    device: torch.device,
) -> Batch:
    """The rows at some positions; marked is True at response tokens."""
    return mark_from(
        [sequences[p] for p in positions], [prompt_lengths[p] for p in positions], device
    )


# --------------------------------------------------------------------------------------- the end


def publish_last(
    job: OnlineJob,
    context: StageContext,
    strategy: Strategy,
    checkpointer: Checkpointer,
    trained: nn.Module,
    source: Path,
) -> Artifact | None:
    """`publish_policy` with the metrics of the last rollout. Every rank calls."""
    context.closing.close()
    last = context.read_metrics()[-1] if context.main else {}
    kept = {k: v for k, v in last.items() if k not in ("step", "total", "time")}
    result = {"metrics": {"steps": job.steps, **kept}}
    return publish_policy(job, context, strategy, checkpointer, trained, source, result)
