"""Reinforcement learning: algorithms that sample from the model that they train."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rlhf_core.jobs.base import BaseJob, Digest, Fraction, PositiveInt, Resources, job_input
from rlhf_core.jobs.training import TrainSettings


class PPOSettings(TrainSettings):
    """Proximal policy optimisation against the reward model."""

    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-6
    """Peak learning rate of the policy."""
    critic_learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Peak learning rate of the critic; empty: the policy's times 5."""
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    """Course of the learning rate after the warm-up (cosine and linear end at 0)."""
    steps: PositiveInt = 100
    """Rollouts."""
    batch_size: PositiveInt = 64
    """Prompts per rollout over all ranks; one reply each."""
    ppo_epochs: PositiveInt = 4
    """Passes over each rollout."""
    minibatches: PositiveInt = 1
    """Optimizer steps per pass."""
    max_new_tokens: PositiveInt = 128
    """Longest reply."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Sampling temperature; log-probabilities are taken at it."""
    kl_coef: Annotated[float, Field(ge=0.0)] = 0.05
    """Weight of the per-token KL penalty to the SFT model."""
    clip_range: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Bound of the probability ratio's deviation from 1."""
    value_clip_range: Annotated[float, Field(gt=0.0)] = 0.2
    """Bound of the value's change from the rollout's value."""
    value_coef: Annotated[float, Field(ge=0.0)] = 0.1
    """Weight of the value loss."""
    gamma: Fraction = 1.0
    """Discount per token."""
    gae_lambda: Fraction = 0.95
    """GAE's lambda."""
    missing_eos_penalty: Annotated[float, Field(ge=0.0)] = 1.0
    """Taken off the score of a reply that was cut at max_new_tokens."""
    ptx_coef: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the language-modelling loss mixed in (PPO-ptx); 0 switches it off."""
    max_kl: Annotated[float, Field(gt=0.0)] = 100.0
    """The stage fails when the KL to the SFT model (nats per reply, mean) exceeds this."""


class PPOJob(PPOSettings, BaseJob):
    """PPO."""

    module: ClassVar[str] = "rlhf_core.train.ppo"
    kind: ClassVar[str] = "model"

    algorithm: Literal["ppo"] = "ppo"
    """Job kind."""
    model: Digest = job_input()
    """SFT model: start of the policy, and the reference."""
    reward_model: Digest = job_input()
    """Reward model, and start of the critic."""
    prompts: Digest = job_input()
    """Data set of purpose prompts."""
    ptx: Digest | None = job_input(default=None)
    """Data set of purpose sft or pretrain that is mixed in when ptx_coef is above 0."""
    resources: Resources = Resources()
    """Placement."""
