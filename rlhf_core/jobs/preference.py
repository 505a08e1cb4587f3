"""Preference optimisation without a reward model: DPO, SimPO, ORPO and KTO."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rlhf_core.jobs.base import (
    LARGEST,
    BaseJob,
    Digest,
    Fraction,
    PositiveInt,
    Resources,
    job_input,
)
from rlhf_core.jobs.training import TrainSettings

Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]


class DPOSettings(TrainSettings):
    """Direct preference optimisation: the policy is its own reward model (arXiv 2305.18290)."""

    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-6
    """Peak learning rate."""
    warmup_fraction: Fraction = 0.1
    """Share of the steps in which the learning rate rises from 0."""
    epochs: PositiveInt = 1
    """Passes over the training pairs."""
    max_steps: PositiveInt | None = None
    """Optimizer steps at most; empty: as many as the epochs need."""
    batch_size: PositiveInt = 64
    """Pairs per optimizer step over all ranks and micro-batches."""
    beta: Positive = 0.1
    """How strongly the policy is held to the model it starts from; smaller moves further. With the
    loss ipo it is the paper's tau: the margin aimed at is 1 / (2 beta) nats."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """sigmoid: DPO; ipo: the squared distance to a margin (arXiv 2310.12036), which overfits less
    where the pairs' labels are certain."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Share of the pairs that are taken to be labelled the wrong way round (conservative DPO)."""

    @model_validator(mode="after")
    def _smoothing_is_of_the_sigmoid(self) -> Self:
        if self.loss == "ipo" and self.label_smoothing > 0:
            raise ValueError(
                f"label_smoothing is {self.label_smoothing:g} and loss is ipo, which has none; set "
                "loss to sigmoid or label_smoothing to 0"
            )
        return self


class SimPOSettings(TrainSettings):
    """Simple preference optimisation: mean log-probabilities, no reference (arXiv 2405.14734)."""

    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-6
    """Peak learning rate; much more makes replies repeat themselves."""
    warmup_fraction: Fraction = 0.1
    """Share of the steps in which the learning rate rises from 0."""
    epochs: PositiveInt = 1
    """Passes over the training pairs."""
    max_steps: PositiveInt | None = None
    """Optimizer steps at most; empty: as many as the epochs need."""
    batch_size: PositiveInt = 128
    """Pairs per optimizer step over all ranks and micro-batches."""
    beta: Positive = 2.0
    """Scale of the mean log-probabilities per token."""
    gamma: NotNegative = 1.0
    """Margin aimed at, in the unit of beta times nats per token; the paper's advice is about half
    of beta."""


class ORPOSettings(TrainSettings):
    """Odds ratio preference optimisation: fine-tuning and preference in one (arXiv 2403.07691)."""

    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 8e-6
    """Peak learning rate."""
    warmup_fraction: Fraction = 0.1
    """Share of the steps in which the learning rate rises from 0."""
    epochs: PositiveInt = 1
    """Passes over the training pairs; a model without fine-tuning before needs several."""
    max_steps: PositiveInt | None = None
    """Optimizer steps at most; empty: as many as the epochs need."""
    batch_size: PositiveInt = 64
    """Pairs per optimizer step over all ranks and micro-batches."""
    orpo_lambda: NotNegative = 0.1
    """Weight of the odds-ratio term beside the cross-entropy of the chosen replies."""


class KTOSettings(TrainSettings):
    """Kahneman-Tversky optimisation: single replies marked good or bad (arXiv 2402.01306)."""

    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 5e-7
    """Peak learning rate."""
    warmup_fraction: Fraction = 0.1
    """Share of the steps in which the learning rate rises from 0."""
    epochs: PositiveInt = 1
    """Passes over the training rows."""
    max_steps: PositiveInt | None = None
    """Optimizer steps at most; empty: as many as the epochs need."""
    batch_size: Annotated[int, Field(ge=2, le=LARGEST)] = 32
    """Replies per optimizer step over all ranks and micro-batches; the estimate of the KL to the
    reference takes prompts and replies of one batch, so small ones make it noisy."""
    beta: Positive = 0.1
    """How strongly the policy is held to the model it starts from; smaller moves further."""
    desirable_weight: NotNegative = 1.0
    """Weight of the good replies. The paper's advice for unequal numbers: weight times number of
    the good ones should be 1 to 4/3 of that of the bad ones."""
    undesirable_weight: NotNegative = 1.0
    """Weight of the bad replies."""

    @model_validator(mode="after")
    def _something_counts(self) -> Self:
        if self.desirable_weight == self.undesirable_weight == 0:
            raise ValueError(
                "desirable_weight and undesirable_weight are both 0, so that nothing would be "
                "learned; set one above 0"
            )
        return self


class DPOJob(DPOSettings, BaseJob):
    """Direct preference optimisation."""

    module: ClassVar[str] = "rlhf_core.algorithms.dpo"
    kind: ClassVar[str] = "model"

    algorithm: Literal["dpo"] = "dpo"
    """Job kind."""
    model: Digest = job_input()
    """SFT model: where the policy starts, and the reference."""
    data: Digest = job_input("preference")
    """Data set of purpose preference."""
    resources: Resources = Resources()
    """Placement."""


class SimPOJob(SimPOSettings, BaseJob):
    """Simple preference optimisation."""

    module: ClassVar[str] = "rlhf_core.algorithms.simpo"
    kind: ClassVar[str] = "model"

    algorithm: Literal["simpo"] = "simpo"
    """Job kind."""
    model: Digest = job_input()
    """SFT model: where the policy starts."""
    data: Digest = job_input("preference")
    """Data set of purpose preference."""
    resources: Resources = Resources()
    """Placement."""


class ORPOJob(ORPOSettings, BaseJob):
    """Odds ratio preference optimisation."""

    module: ClassVar[str] = "rlhf_core.algorithms.orpo"
    kind: ClassVar[str] = "model"

    algorithm: Literal["orpo"] = "orpo"
    """Job kind."""
    model: Digest = job_input()
    """Where the policy starts; no fine-tuning is needed before."""
    data: Digest = job_input("preference")
    """Data set of purpose preference."""
    resources: Resources = Resources()
    """Placement."""


class KTOJob(KTOSettings, BaseJob):
    """Kahneman-Tversky optimisation."""

    module: ClassVar[str] = "rlhf_core.algorithms.kto"
    kind: ClassVar[str] = "model"

    algorithm: Literal["kto"] = "kto"
    """Job kind."""
    model: Digest = job_input()
    """Where the policy starts, and the reference."""
    data: Digest = job_input("unpaired")
    """Data set of purpose unpaired, or of purpose preference: each pair is a good and a bad one."""
    resources: Resources = Resources()
    """Placement."""


PreferenceJob = DPOJob | SimPOJob | ORPOJob | KTOJob
"""Any of these."""
