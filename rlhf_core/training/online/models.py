"""The models of online algorithms: what is trained, the reference and the rewards."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_core.data.encoding.tokenizer import load_tokenizer
from rlhf_core.jobs import ModelReward, OnlineJob
from rlhf_core.jobs.reward_services import SERVICES
from rlhf_core.jobs.rewards import EnvironmentReward
from rlhf_core.model_files.remote_code import is_trusted
from rlhf_core.models.loading import load_causal_lm, load_scalar_model
from rlhf_core.nn.ensemble import RewardEnsemble
from rlhf_core.nn.layers import share_frozen
from rlhf_core.nn.modules import Actor, ActorCritic, Policy, ScalarModel
from rlhf_core.nn.padding import TokenIndex
from rlhf_core.nn.shared_trunk import Trunk, find_trunk
from rlhf_core.rewards import Rules
from rlhf_core.rewards.services import Services
from rlhf_core.runtime.context import StageContext
from rlhf_core.training.policy import frozen_storage
from rlhf_core.training.strategy import HALF, Strategy


class AdapterOff:
    """The reference of a policy that trains adapters: the policy itself without them."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    @torch.no_grad()
    def __call__(
        self,
        input_ids: Tensor,
        mask: Tensor,
        response_mask: Tensor,
        index: TokenIndex | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Log-probabilities (b,S), as `Policy` gives them."""
        with self.policy.model.disable_adapter():  # type: ignore[operator]
            return self.policy(input_ids, mask, response_mask, index, temperature)


@dataclass(frozen=True)
class Models:
    """`trained` is trained, all else is frozen."""

    trained: ActorCritic | Actor
    reference: Policy | AdapterOff | None  # None when no KL is measured
    reward: RewardEnsemble | None  # None when all rewards are rules
    rules: Rules
    weights: dict[str, float]  # of each reward, by name
    tokenizer: Any  # None on ranks that decode nothing
    trunk: Trunk | None = None  # of all of them, see `share_trunk`
    services: Services | None = None  # None when no reward is a service


def load_models(
    job: OnlineJob,
    strategy: Strategy,
    source: Path,
    trained: ActorCritic | Actor,
    context: StageContext,
) -> Models:
    """Reference and reward beside the trained module, which is on its device already.

    Frozen layers that are equal share memory, but not where all models are sharded: each rank then
    holds its own part of each.
    """
    # ZeRO and FSDP2 compute with weights in half precision; the frozen models then do as well,
    # so that reference and policy start from the same numbers.
    half = strategy.kind != "ddp" and job.precision != "fp32"
    dtype, nf4, empty = frozen_storage(job, strategy)
    dtype = HALF[job.precision] if half else dtype
    # One after another: the peak is then what is kept, not several whole models.
    saved = 0 if strategy.sharded else share_frozen(trained)
    reference: Policy | AdapterOff | None = None
    frozen: list[nn.Module] = []
    if job.needs_reference and job.lora is not None:
        reference = AdapterOff(trained.policy)
    elif job.needs_reference:
        reference = Policy(load_causal_lm(source, dtype, None, empty)).requires_grad_(False)
        frozen.append(strategy.place_frozen(reference))
        saved += 0 if strategy.sharded else share_frozen(trained, *frozen)
    members: list[ScalarModel] = []
    for digest in job.reward_models if job.wants_reward_model else ():
        folder = context.store.fetch(digest)
        members.append(load_scalar_model(folder, dtype, nf4, empty).requires_grad_(False))
        frozen.append(strategy.place_frozen(members[-1]))
        saved += 0 if strategy.sharded else share_frozen(trained, *frozen)
    reward = RewardEnsemble(members, job) if members else None
    if saved:
        context.log(f"frozen layers shared between the models: {saved / 2**20:.0f} MiB saved")
    rules = Rules(job.rewards, job.seed)
    weights = dict(zip(rules.names, rules.weights, strict=True))
    weights["model"] = sum(r.weight for r in job.rewards if isinstance(r, ModelReward))
    weights["environment"] = sum(r.weight for r in job.rewards if isinstance(r, EnvironmentReward))
    services = load_services(job, strategy, context)
    if services is not None:
        weights |= dict(zip(services.names, services.weights, strict=True))
    # Rank 0 shows replies to people; rules, services and environments read them on every rank.
    reads = context.main or bool(rules.names) or services is not None or job.environment is not None
    tokenizer = load_tokenizer(source, is_trusted(source)) if reads else None
    return Models(trained, reference, reward, rules, weights, tokenizer, services=services)


def load_services(job: OnlineJob, strategy: Strategy, context: StageContext) -> Services | None:
    """The services among the job's rewards, with the answers that this stage has had before."""
    if not any(isinstance(reward, SERVICES) for reward in job.rewards):
        return None
    folder = context.folder / "reward_answers"
    # Samplers of their own hand their replies to rank 0.
    services = Services(
        job.rewards, folder, strategy.rank, strategy.world_size, first_asks=job.rollout.separate
    )
    context.closing.callback(services.close)
    return services


def share_trunk(
    job: OnlineJob, strategy: Strategy, models: Models, context: StageContext
) -> Models:
    """The models, with the layers that they have in common. After `strategy.prepare`.

    Not with text that is mixed in, which goes through the policy alone and in the same pass, and
    not where models are sharded: their lower layers would have to be compared part by part.
    """
    if job.trainable_layers is None or strategy.sharded or job.ptx_coef > 0:
        return models
    whole: list[nn.Module] = [models.trained.policy.model]
    if models.reference is not None:
        assert isinstance(models.reference, Policy)  # adapters exclude trainable layers
        whole.append(models.reference.model)
    if isinstance(models.trained, ActorCritic):
        whole.append(models.trained.critic.backbone)
    if models.reward is not None:
        whole += [member.backbone for member in models.reward.members]
    trunk = find_trunk(whole)
    if trunk is not None:
        context.log(f"the lower {trunk.depth} layers run once for all {len(whole)} models")
    return replace(models, trunk=trunk)
