"""Ensembles of reward models: how their scores are combined, and the jobs that use them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from rlhf_core.jobs.base import LARGEST, BaseJob, Digest, Settings


class CombineSettings(Settings):
    """How the scores of several reward models become one."""

    combine: Literal["mean", "min", "mean_minus_std"] = "mean"
    """Score of several reward models: their mean, the lowest, or the mean less std_coef times their
    standard deviation. The last two distrust what the members disagree on."""
    std_coef: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight of the standard deviation in mean_minus_std. With two members 1 is the lowest
    score."""
    member_weights: tuple[Annotated[float, Field(ge=-LARGEST, le=LARGEST)], ...] = ()
    """Weights of several reward models that score different things: the score is the weighted sum
    of theirs, in their order. Empty: all alike, see combine."""

    @model_validator(mode="after")
    def _weights_are_of_a_sum(self) -> Self:
        if self.member_weights and self.combine != "mean":
            raise ValueError(
                f"member_weights are given and combine is {self.combine}; clear one of them"
            )
        if self.member_weights and not any(self.member_weights):
            raise ValueError("member_weights are all 0; expected at least one other")
        return self


class EnsembleJob(CombineSettings, BaseJob):
    """A job that scores replies with its field `reward_model`, and with more models beside it."""

    ensemble: tuple[Digest, ...] = ()
    """Further reward models, combined with the first."""

    def key_settings(self) -> dict[str, Any]:
        """Leaves out how models are combined where there is one, so that older results keep their
        keys."""
        settings = super().key_settings()
        if not self.ensemble:
            for name in ("ensemble", "combine", "std_coef"):
                del settings[name]
        if not self.member_weights:
            del settings["member_weights"]
        return settings

    def inputs(self) -> dict[str, str]:
        """The further members are `reward_model-2` and so on."""
        members = {f"reward_model-{n}": digest for n, digest in enumerate(self.ensemble, start=2)}
        return super().inputs() | members

    @property
    def reward_models(self) -> tuple[str, ...]:
        """Digests of all members; empty without a reward model."""
        first = getattr(self, "reward_model", None)
        return (first, *self.ensemble) if first is not None else ()

    @model_validator(mode="after")
    def _each_member_has_a_weight(self) -> Self:
        weights, models = len(self.member_weights), len(self.reward_models)
        if weights and weights != models:
            raise ValueError(
                f"member_weights has {weights} numbers for {models} reward models; give one for "
                "each, or clear it"
            )
        return self
