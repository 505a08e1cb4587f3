"""Settings and jobs of PPO, GRPO, RLOO and REINFORCE++."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rlhf_core.jobs.base import Digest, Fraction, PositiveInt, Resources, job_input
from rlhf_core.jobs.online import OnlineJob, OnlineSettings

GroupSize = Annotated[int, Field(ge=2, le=1024)]


class PPOSettings(OnlineSettings):
    """Proximal policy optimisation with a critic (arXiv 1707.06347)."""

    critic_learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Peak learning rate of the critic. Empty: five times the policy's."""
    ppo_epochs: PositiveInt = 4
    """Epochs over each rollout."""
    value_clip_range: Annotated[float, Field(gt=0.0)] = 0.2
    """A value is clipped to this distance from the rollout's value."""
    value_coef: Annotated[float, Field(ge=0.0)] = 0.1
    """Weight of the value loss."""
    gamma: Fraction = 1.0
    """Discount per token."""
    gae_lambda: Fraction = 0.95
    """Lambda of generalised advantage estimation (GAE)."""


class PPOJob(PPOSettings, OnlineJob):
    """PPO."""

    module: ClassVar[str] = "rlhf_core.algorithms.ppo"
    critic: ClassVar[bool] = True

    algorithm: Literal["ppo"] = "ppo"
    """Name of the algorithm."""
    reward_model: Digest | None = job_input(default=None)
    """Reward model, and start of the critic. Empty when all rewards are rules; the critic then
    starts from the SFT model."""
    resources: Resources = Resources()
    """Placement of the job."""


class GroupSettings(OnlineSettings):
    """Settings of algorithms that compare several replies to one prompt."""

    batch_size: PositiveInt = 16
    """Prompts per rollout over all ranks, with group_size replies each."""
    group_size: GroupSize = 8
    """Replies to each prompt."""
    epochs: PositiveInt = 1
    """Epochs over each rollout."""

    @property
    def replies(self) -> int:
        return self.batch_size * self.group_size


class GRPOSettings(GroupSettings):
    """Group relative policy optimisation (arXiv 2402.03300): the group's mean and standard
    deviation replace the critic."""

    kl_coef: Annotated[float, Field(ge=0.0)] = 0.04
    """Weight of the KL to the SFT model, a term of the loss."""
    scale_rewards: bool = True
    """Divide advantages by the standard deviation of the group's scores. false (Dr. GRPO): prompts
    whose replies hardly differ weigh less."""
    average: Literal["reply", "token"] = "reply"
    """How the loss is averaged. reply: over each reply's tokens, then over replies, as in the
    paper; bad replies then tend to grow. token: over all tokens of the rollout (Dr. GRPO, DAPO)."""

    @model_validator(mode="after")
    def _scores_are_scaled_once(self) -> Self:
        if self.score_whiten and self.scale_rewards:
            raise ValueError(
                "score_whiten and scale_rewards are both set, and scale_rewards scales the scores "
                "of each group already; clear one"
            )
        return self


class GRPOJob(GRPOSettings, OnlineJob):
    """GRPO."""

    module: ClassVar[str] = "rlhf_core.algorithms.grpo"

    algorithm: Literal["grpo"] = "grpo"
    """Name of the algorithm."""
    resources: Resources = Resources()
    """Placement of the job."""


class RLOOSettings(GroupSettings):
    """REINFORCE leave-one-out (arXiv 2402.14740): a reply's baseline is the mean of the other
    replies in its group."""

    one_action: ClassVar[bool] = True

    group_size: GroupSize = 4
    """Replies to each prompt."""


class RLOOJob(RLOOSettings, OnlineJob):
    """RLOO."""

    module: ClassVar[str] = "rlhf_core.algorithms.rloo"

    algorithm: Literal["rloo"] = "rloo"
    """Name of the algorithm."""
    resources: Resources = Resources()
    """Placement of the job."""


class ReinforcePPSettings(OnlineSettings):
    """REINFORCE++ (arXiv 2501.03262): per-token rewards, whitened over the global batch, with one
    reply to each prompt."""

    kl_coef: Annotated[float, Field(ge=0.0)] = 0.01
    """Weight of the per-token KL penalty to the SFT model."""
    epochs: PositiveInt = 1
    """Epochs over each rollout."""
    gamma: Fraction = 1.0
    """Discount per token."""


class ReinforcePPJob(ReinforcePPSettings, OnlineJob):
    """REINFORCE++."""

    module: ClassVar[str] = "rlhf_core.algorithms.reinforce_pp"

    algorithm: Literal["reinforce_pp"] = "reinforce_pp"
    """Name of the algorithm."""
    resources: Resources = Resources()
    """Placement of the job."""
