"""Rejection sampling (best-of-n SFT): settings, and the jobs of its two stages."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from rlhf_core.jobs.base import Digest, PositiveInt, Resources, Settings, job_input
from rlhf_core.jobs.ensemble import EnsembleJob
from rlhf_core.jobs.objective import check_reward_model, checked_rewards, needs_reward_model
from rlhf_core.jobs.reward_services import without_asking
from rlhf_core.jobs.rewards import ModelReward, Reward
from rlhf_core.jobs.training import HeldOutJob, SFTSettings


class BestOfNSettings(Settings):
    """Several replies to each prompt, of which the best are kept."""

    rewards: tuple[Reward, ...] = (ModelReward(),)
    """What makes a reply good: a weighted sum of the reward model's score and of rules."""
    samples_per_prompt: Annotated[int, Field(ge=1, le=1024)] = 8
    """Replies sampled for each prompt (n)."""
    keep_per_prompt: Annotated[int, Field(ge=1, le=1024)] = 1
    """How many different replies to a prompt are kept at most, from the highest score on. 1: the
    best of n."""
    min_score: float | None = None
    """Replies with a lower score are not kept: with a rule that gives 1 to a correct reply, 1.0
    keeps correct replies only. Prompts without any are left out and counted. Empty: no bound."""
    keep_unfinished: bool = False
    """Keep replies that were cut at max_new_tokens too. They have no end-of-turn token to learn."""
    max_prompts: PositiveInt = 1024
    """Maximum number of training prompts."""
    max_heldout_prompts: PositiveInt = 64
    """Maximum number of held-out prompts, whose kept replies are the held-out rows."""
    max_new_tokens: PositiveInt = 128
    """Longest reply in tokens."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Sampling temperature."""

    @field_validator("rewards")
    @classmethod
    def _some_rewards(cls, rewards: tuple[Reward, ...]) -> tuple[Reward, ...]:
        return checked_rewards(rewards)

    @model_validator(mode="after")
    def _enough_are_sampled(self) -> Self:
        if self.keep_per_prompt > self.samples_per_prompt:
            raise ValueError(
                f"keep_per_prompt is {self.keep_per_prompt}, more than samples_per_prompt "
                f"({self.samples_per_prompt}); lower it, or sample more"
            )
        if self.samples_per_prompt == 1 and self.min_score is None:
            raise ValueError(
                "samples_per_prompt is 1 and min_score is empty, so every reply would be kept; "
                "sample at least 2, or set min_score"
            )
        return self

    @property
    def wants_reward_model(self) -> bool:
        """Whether the reward model's score is one of the rewards."""
        return needs_reward_model(self.rewards)


class RejectionSamplingSettings(BestOfNSettings, SFTSettings):
    """Rejection sampling (RAFT, arXiv 2304.06767; Llama 2, arXiv 2307.09288; for answers that can
    be checked RFT, arXiv 2308.01825): the best of n replies become demonstrations for SFT."""

    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-5
    """Peak learning rate."""


class BestOfNJob(BestOfNSettings, EnsembleJob):
    """Samples replies from a model and keeps the best as demonstrations."""

    module: ClassVar[str] = "rlhf_core.stages.best_of_n"
    kind: ClassVar[str] = "dataset"

    algorithm: Literal["best_of_n"] = "best_of_n"
    """Name of the stage."""
    model: Digest = job_input()
    """Model to sample from."""
    prompts: Digest = job_input()
    """Data set of purpose prompts."""
    reward_model: Digest | None = job_input(default=None)
    """Reward model. Empty when all rewards are rules."""
    resources: Resources = Resources()
    """Placement of the job."""

    def key_settings(self) -> dict[str, Any]:
        """Leaves out how services that score replies are asked."""
        settings = super().key_settings()
        without_asking(self.rewards, settings["rewards"])
        return settings

    @model_validator(mode="after")
    def _rewards_have_their_model(self) -> Self:
        check_reward_model(self.rewards, self.reward_model is not None)
        return self


class RejectionSamplingJob(SFTSettings, HeldOutJob):
    """SFT on the best of n sampled replies."""

    module: ClassVar[str] = "rlhf_core.algorithms.sft"
    kind: ClassVar[str] = "model"

    algorithm: Literal["rejection_sampling"] = "rejection_sampling"
    """Name of the algorithm."""
    model: Digest = job_input()
    """Model that the replies were sampled from."""
    data: Digest = job_input("best_of_n")
    """Data set of purpose sft, as the stage best_of_n makes it."""
    resources: Resources = Resources()
    """Placement of the job."""
