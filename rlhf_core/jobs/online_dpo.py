"""Settings and job of online DPO."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rlhf_core.jobs.base import PositiveInt, Resources
from rlhf_core.jobs.online import OnlineJob, OnlineSettings


class OnlineDPOSettings(OnlineSettings):
    """Online DPO (arXiv 2402.04792): two replies to each prompt, of which the rewards pick the
    better one; the pair is trained on with DPO's loss at once."""

    takes_weights: ClassVar[bool] = False

    batch_size: PositiveInt = 32
    """Prompts per rollout over all ranks, with two replies each."""
    beta: Annotated[float, Field(gt=0.0)] = 0.1
    """How strongly the policy is held to the SFT model; a smaller value moves further."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """sigmoid: DPO. ipo (arXiv 2310.12036): the squared distance of the margin to 1 / (2 beta)."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Assumed fraction of pairs in which the rewards prefer the wrong reply (sigmoid only)."""
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

    def current_version(self) -> int:
        """2 where replies are left out of the loss: before, the other one of a pair was not."""
        return 2 if self.mask_truncated_completions else super().current_version()
