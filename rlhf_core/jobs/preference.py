"""Preference optimisation without a reward model: DPO, SimPO, ORPO and KTO."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rlhf_core.jobs.base import (
    LARGEST,
    Digest,
    Fraction,
    PositiveInt,
    Resources,
    job_input,
)
from rlhf_core.jobs.training import HeldOutJob, HeldOutSettings

Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]


class DPOSettings(HeldOutSettings):
    """Direct preference optimisation (arXiv 2305.18290): the policy is its own reward model."""

    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-6
    """Peak learning rate."""
    warmup_fraction: Fraction = 0.1
    """Fraction of the steps in which the learning rate rises from 0."""
    epochs: PositiveInt = 1
    """Epochs over the training pairs."""
    max_steps: PositiveInt | None = None
    """Maximum number of optimizer steps. Empty: as many as the epochs need."""
    batch_size: PositiveInt = 64
    """Pairs per optimizer step over all ranks and micro-batches."""
    beta: Positive = 0.1
    """How strongly the policy is held to its start; a smaller value moves further. With loss ipo it
    is the paper's tau: the target margin is 1 / (2 beta) nats."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """sigmoid: DPO. ipo: squared distance to a margin (arXiv 2310.12036), which overfits less when
    the labels are certain."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Assumed fraction of pairs with swapped labels (conservative DPO)."""

    @model_validator(mode="after")
    def _smoothing_is_of_the_sigmoid(self) -> Self:
        if self.loss == "ipo" and self.label_smoothing > 0:
            raise ValueError(
                f"label_smoothing is {self.label_smoothing:g} and loss is ipo, which has none; set "
                "loss to sigmoid or label_smoothing to 0"
            )
        return self


class SimPOSettings(HeldOutSettings):
    """Simple preference optimisation (arXiv 2405.14734): mean log-probabilities, no reference
    model."""

    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-6
    """Peak learning rate. A much larger one makes replies repeat themselves."""
    warmup_fraction: Fraction = 0.1
    """Fraction of the steps in which the learning rate rises from 0."""
    epochs: PositiveInt = 1
    """Epochs over the training pairs."""
    max_steps: PositiveInt | None = None
    """Maximum number of optimizer steps. Empty: as many as the epochs need."""
    batch_size: PositiveInt = 128
    """Pairs per optimizer step over all ranks and micro-batches."""
    beta: Positive = 2.0
    """Scale of the mean log-probabilities per token."""
    gamma: NotNegative = 1.0
    """Target margin, in beta times nats per token. The paper recommends about half of beta."""


class ORPOSettings(HeldOutSettings):
    """Odds ratio preference optimisation (arXiv 2403.07691): fine-tuning and preferences in one
    stage."""

    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 8e-6
    """Peak learning rate."""
    warmup_fraction: Fraction = 0.1
    """Fraction of the steps in which the learning rate rises from 0."""
    epochs: PositiveInt = 1
    """Epochs over the training pairs. A model that was not fine-tuned before needs several."""
    max_steps: PositiveInt | None = None
    """Maximum number of optimizer steps. Empty: as many as the epochs need."""
    batch_size: PositiveInt = 64
    """Pairs per optimizer step over all ranks and micro-batches."""
    orpo_lambda: NotNegative = 0.1
    """Weight of the odds-ratio term; the cross-entropy of the chosen replies has weight 1."""


class KTOSettings(HeldOutSettings):
    """Kahneman-Tversky optimisation (arXiv 2402.01306): single replies labelled good or bad."""

    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 5e-7
    """Peak learning rate."""
    warmup_fraction: Fraction = 0.1
    """Fraction of the steps in which the learning rate rises from 0."""
    epochs: PositiveInt = 1
    """Epochs over the training rows."""
    max_steps: PositiveInt | None = None
    """Maximum number of optimizer steps. Empty: as many as the epochs need."""
    batch_size: Annotated[int, Field(ge=2, le=LARGEST)] = 32
    """Replies per optimizer step over all ranks and micro-batches. The KL to the reference is
    estimated within a batch, so small batches make it noisy."""
    beta: Positive = 0.1
    """How strongly the policy is held to its start; a smaller value moves further."""
    desirable_weight: NotNegative = 1.0
    """Weight of the good replies. The paper recommends, for unequal numbers: weight times number of
    the good replies is 1 to 4/3 times that of the bad ones."""
    undesirable_weight: NotNegative = 1.0
    """Weight of the bad replies."""

    @model_validator(mode="after")
    def _something_counts(self) -> Self:
        if self.desirable_weight == self.undesirable_weight == 0:
            raise ValueError(
                "desirable_weight and undesirable_weight are both 0, so nothing would be "
                "learned; set one above 0"
            )
        return self


class DPOJob(DPOSettings, HeldOutJob):
    """Direct preference optimisation."""

    module: ClassVar[str] = "rlhf_core.algorithms.dpo"
    kind: ClassVar[str] = "model"

    algorithm: Literal["dpo"] = "dpo"
    """Name of the algorithm."""
    model: Digest = job_input()
    """SFT model: start of the policy, and the reference."""
    data: Digest = job_input("preference")
    """Data set of purpose preference."""
    resources: Resources = Resources()
    """Placement of the job."""


class SimPOJob(SimPOSettings, HeldOutJob):
    """Simple preference optimisation."""

    module: ClassVar[str] = "rlhf_core.algorithms.simpo"
    kind: ClassVar[str] = "model"

    algorithm: Literal["simpo"] = "simpo"
    """Name of the algorithm."""
    model: Digest = job_input()
    """SFT model: start of the policy."""
    data: Digest = job_input("preference")
    """Data set of purpose preference."""
    resources: Resources = Resources()
    """Placement of the job."""


class ORPOJob(ORPOSettings, HeldOutJob):
    """Odds ratio preference optimisation."""

    module: ClassVar[str] = "rlhf_core.algorithms.orpo"
    kind: ClassVar[str] = "model"

    algorithm: Literal["orpo"] = "orpo"
    """Name of the algorithm."""
    model: Digest = job_input()
    """Start of the policy; it needs no fine-tuning before."""
    data: Digest = job_input("preference")
    """Data set of purpose preference."""
    resources: Resources = Resources()
    """Placement of the job."""


class KTOJob(KTOSettings, HeldOutJob):
    """Kahneman-Tversky optimisation."""

    module: ClassVar[str] = "rlhf_core.algorithms.kto"
    kind: ClassVar[str] = "model"

    algorithm: Literal["kto"] = "kto"
    """Name of the algorithm."""
    model: Digest = job_input()
    """Start of the policy, and the reference."""
    data: Digest = job_input("unpaired")
    """Data set of purpose unpaired; or of purpose preference, each pair as a good and a bad
    reply."""
    resources: Resources = Resources()
    """Placement of the job."""


PreferenceJob = DPOJob | SimPOJob | ORPOJob | KTOJob
"""A job of any preference stage."""
