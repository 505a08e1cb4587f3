"""Settings and job of online DPO."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from rlhf_core.jobs.base import PositiveInt, Resources
from rlhf_core.jobs.judging import EndpointJudgeSettings, without_asking
from rlhf_core.jobs.objective import checked_rewards
from rlhf_core.jobs.online import OnlineJob, OnlineSettings
from rlhf_core.jobs.rewards import Reward


class OnlineDPOSettings(OnlineSettings):
    """Online DPO (arXiv 2402.04792): two replies to each prompt, of which the rewards or a judge
    pick the better one; the pair is trained on with DPO's loss at once."""

    takes_weights: ClassVar[bool] = False

    batch_size: PositiveInt = 32
    """Prompts per rollout over all ranks, with two replies each."""
    judge: EndpointJudgeSettings | None = None
    """A model behind an endpoint that compares the two replies, in both orders, in place of the
    rewards, which are then []. Ties teach nothing. missing_eos_penalty has no effect with it.
    Empty: the reply with the higher score is the better one."""
    beta: Annotated[float, Field(gt=0.0)] = 0.1
    """How strongly the policy is held to the SFT model; a smaller value moves further."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """sigmoid: DPO. ipo (arXiv 2310.12036): the squared distance of the margin to 1 / (2 beta)."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Assumed fraction of pairs in which the wrong reply is preferred (sigmoid only)."""
    min_margin: Annotated[float, Field(ge=0.0)] = 0.0
    """Smallest difference of the two scores. Closer pairs teach nothing and are counted as ties;
    equal scores always are one."""
    kl_coef: Annotated[float, Field(ge=0.0)] = 0.0
    """Not used here: beta holds the policy to the SFT model."""

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def replies(self) -> int:
        return 2 * self.batch_size

    @field_validator("rewards")
    @classmethod
    def _some_rewards(cls, rewards: tuple[Reward, ...]) -> tuple[Reward, ...]:
        return checked_rewards(rewards, environment=True) if rewards else rewards

    @model_validator(mode="after")
    def _one_decides_which_reply_is_better(self) -> Self:
        if self.judge is None and not self.rewards:
            raise ValueError(
                "rewards and judge are both empty, so nothing says which reply is better; add a "
                "reward, or give a judge, such as {url: ..., model: ...}"
            )
        if self.judge is None:
            return self
        if self.rewards:
            names = ", ".join(reward.type for reward in self.rewards)
            raise ValueError(
                f"judge is set and rewards has {names}, but one of the two says which reply is "
                "better; set rewards to [], or clear judge"
            )
        needs_scores = {
            "min_margin": self.min_margin > 0,
            "score_whiten": self.score_whiten,
            "eval_every": self.eval_every is not None,
            "curriculum": self.curriculum is not None,
            "environment": self.environment is not None,
        }
        for name, used in needs_scores.items():
            if used:
                raise ValueError(
                    f"{name} is set with a judge, which compares single replies and gives no "
                    f"scores; clear {name}, or take rewards in place of the judge"
                )
        return self

    @model_validator(mode="after")
    def _settings_of_other_algorithms_are_not_ignored(self) -> Self:
        default = OnlineDPOSettings.model_fields["clip_range"].default
        if self.kl_coef or self.kl_target is not None or self.clip_range != default:
            raise ValueError(
                "kl_coef, kl_target and clip_range have no effect in online_dpo, where beta holds "
                "the policy to the SFT model; clear them, and set beta"
            )
        correction = self.rollout.correction
        if correction not in (None, type(self.rollout).model_fields["correction"].default):
            raise ValueError(
                "rollout.correction has no effect in online_dpo, whose loss of a pair holds "
                "whoever sampled it; clear it"
            )
        if self.minibatches > 1:
            raise ValueError(
                f"minibatches is {self.minibatches}, but online_dpo takes one optimizer step on "
                "each rollout; set it to 1, and use a smaller batch_size"
            )
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError(
                f"label_smoothing is {self.label_smoothing:g} and loss ipo, which has none; clear "
                "one"
            )
        return self


class OnlineDPOJob(OnlineDPOSettings, OnlineJob):
    """Online DPO."""

    module: ClassVar[str] = "rlhf_core.algorithms.online_dpo"

    algorithm: Literal["online_dpo"] = "online_dpo"
    """Name of the algorithm."""
    resources: Resources = Resources()
    """Placement of the job."""

    def key_settings(self) -> dict[str, Any]:
        """Leaves out how a judge is asked."""
        settings = super().key_settings()
        if self.judge is not None:
            settings["judge"] = without_asking(settings["judge"])
        return settings

    def current_version(self) -> int:
        """2 where replies are left out of the loss: before, the other one of a pair was not."""
        return 2 if self.mask_truncated_completions else super().current_version()
