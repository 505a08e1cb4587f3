"""Settings of all training stages; supervised fine-tuning and the reward model."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rlhf_core.jobs.base import (
    BaseJob,
    Digest,
    Fraction,
    PositiveInt,
    Precision,
    Quantization,
    Resources,
    Settings,
    job_input,
)
from rlhf_core.jobs.ensemble import CombineSettings
from rlhf_core.jobs.lora import LoRA

Select = Literal["best", "last"]


class TrainSettings(Settings):
    """Settings that all training stages share."""

    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-5
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after the warm-up. cosine and linear end at 0."""
    warmup_fraction: Fraction = 0.03
    """Fraction of the steps in which the learning rate rises from 0."""
    batch_size: PositiveInt = 32
    """Rows per optimizer step over all ranks and micro-batches."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """AdamW weight decay (not on biases and norms)."""
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0
    """The norm of the gradient is clipped to this."""
    precision: Precision = "bf16"
    """Precision of forward and backward; fp16 needs a GPU. Master weights and optimizer are fp32.
    On a CPU without bf16 arithmetic, ddp computes bf16 stages in fp32."""
    on_nonfinite: Literal["fail"] | Annotated[float, Field(gt=0.0, lt=1.0)] = "fail"
    """What to do at a NaN or infinite loss or gradient: fail, or resume from the last checkpoint
    with the learning rate times this factor, at most twice. The result records it."""
    lora: LoRA | None = None
    """Train low-rank adapters instead of the weights. Empty: off."""
    trainable_layers: PositiveInt | None = None
    """Train only the top n transformer layers, the last norm and the heads. Empty: everything. In
    online RL the layers below run once for policy, reference, critic and reward model."""
    resources: Resources | None = None
    """Placement of this stage. Empty: the pipeline's."""

    @model_validator(mode="after")
    def _one_way_to_freeze(self) -> Self:
        if self.lora is not None and self.trainable_layers is not None:
            raise ValueError(
                "lora and trainable_layers are both set; they exclude each other: clear one"
            )
        return self


def quantization_problem(
    quantization: Quantization | None, settings: TrainSettings, resources: Resources, stage: str
) -> str | None:
    """Why a stage cannot train with quantised weights; None if it can, or if they are not."""
    if quantization is None:
        return None
    if settings.lora is None:
        return (
            f"model.quantization is {quantization}, which needs lora in {stage}, because quantised "
            f"weights cannot be trained; set {stage}.lora, for example {{rank: 16}}, or clear "
            "model.quantization"
        )
    if resources.strategy != "ddp":
        return (
            f"{stage}.resources.strategy is {resources.strategy}, but model.quantization is "
            f"{quantization}, whose weights are not sharded: every rank holds all of them; use ddp"
        )
    return None


class TrainJob(BaseJob):
    """What all training jobs share."""

    quantization: Quantization | None = None
    """How frozen weights are held, as model.quantization says."""

    def key_settings(self) -> dict[str, Any]:
        """Leaves out quantization where there is none, so that older results keep their keys."""
        settings = super().key_settings()
        if settings["quantization"] is None:
            del settings["quantization"]
        return settings

    @model_validator(mode="after")
    def _quantised_weights_are_frozen(self) -> Self:
        assert isinstance(self, TrainSettings)
        stage = self.module.rpartition(".")[2]
        problem = quantization_problem(self.quantization, self, self.placement(), stage)
        if problem is not None:
            raise ValueError(problem)
        return self


class HeldOutSettings(TrainSettings):
    """Settings of stages that can be evaluated while they train."""

    eval_every: PositiveInt | None = None
    """Steps between two evaluations on held-out rows during training (and one at the end). The
    result then has the weights of the best evaluation, unless publish.select is last. Empty: none,
    and the last weights."""
    patience: PositiveInt | None = None
    """The stage ends after this many evaluations in a row none of which was the best so far. Empty:
    it takes all its steps."""

    @model_validator(mode="after")
    def _patience_has_something_to_wait_for(self) -> Self:
        if self.patience is not None and self.eval_every is None:
            raise ValueError(
                f"patience is {self.patience} but eval_every is empty, so there are no evaluations "
                "to count; set eval_every, or clear patience"
            )
        return self


class HeldOutJob(HeldOutSettings, TrainJob):
    """What jobs have in common that can be evaluated while they train."""

    select: Select = "best"
    """Which weights are the result, as publish.select says."""

    @property
    def selects(self) -> bool:
        """Whether the weights of the best evaluation are the result."""
        return self.eval_every is not None and self.select == "best"

    def key_settings(self) -> dict[str, Any]:
        """Leaves the evaluations out where there are none, so that older results keep their
        keys."""
        settings = super().key_settings()
        if self.eval_every is None:
            for name in ("eval_every", "patience", "select"):
                del settings[name]
        return settings


class SFTSettings(HeldOutSettings):
    """Supervised fine-tuning: cross-entropy on the assistant's tokens."""

    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 2e-5
    """Peak learning rate."""
    epochs: PositiveInt = 1
    """Epochs over the training rows."""
    max_steps: PositiveInt | None = None
    """Maximum number of optimizer steps. Empty: as many as the epochs need."""
    batch_size: PositiveInt = 32
    """Sequences per optimizer step over all ranks and micro-batches."""


class RewardSettings(CombineSettings, TrainSettings):
    """Reward model: a scalar head trained on preference pairs."""

    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-5
    """Peak learning rate."""
    epochs: PositiveInt = 1
    """Epochs over the training pairs. More than one overfits quickly."""
    max_steps: PositiveInt | None = None
    """Maximum number of optimizer steps. Empty: as many as the epochs need."""
    batch_size: PositiveInt = 32
    """Pairs per optimizer step over all ranks and micro-batches."""
    loss: Literal["log_sig", "log_exp"] = "log_sig"
    """-log sigmoid(c - r) or log(1 + exp(r - c)): two names of the same function."""
    pooling: Literal["last", "mean"] = "last"
    """Input of the head: the hidden state of the last token, or the mean over all tokens so far.
    The mean needs far fewer pairs when replies are short or cut."""
    head: Literal["random", "probe"] = "random"
    """Start of the head: random, or a linear probe, which needs far fewer pairs. probe: logistic
    regression on the untrained model's states, penalty cross-validated over prompts (LP-FT)."""
    margin_coef: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the pairs' margins: the loss is -log sigmoid(c - r - margin_coef * margin), as in
    Llama 2. A margin is a column of the data (data.preference.columns: {margin: <its name>}), or
    the difference of the labeller's scores where pairs are sampled. 0: off."""
    center_coef: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the term (c + r)^2 in the loss, which holds the mean score of a pair at 0, for
    example 0.01. Scores of different prompts can then be compared. 0: off."""
    length_debias: bool = False
    """Train on what the replies' lengths do not explain: a logistic regression on the difference of
    lengths, fitted to the training pairs, is added to c - r in the loss and left out afterwards (a
    product of experts)."""
    normalization_prompts: PositiveInt = 64
    """Training prompts whose SFT replies set the mean score to 0 and its standard deviation to
    1."""
    max_new_tokens: PositiveInt = 64
    """Longest of these SFT replies in tokens, when they have to be sampled."""
    members: Annotated[int, Field(ge=1, le=64)] = 1
    """Reward models to train, each with another seed, for the order of the pairs and the start of
    the head. Online RL, labelling and evaluation use all of them, see combine."""
    min_heldout_accuracy: Fraction | None = None
    """Gate: the run stops after this stage when the accuracy on held-out pairs is lower. Empty: no
    gate."""


class SFTJob(SFTSettings, HeldOutJob):
    """Supervised fine-tuning."""

    module: ClassVar[str] = "rlhf_core.algorithms.sft"
    kind: ClassVar[str] = "model"

    algorithm: Literal["sft"] = "sft"
    """Name of the algorithm."""
    model: Digest = job_input()
    """Base model."""
    data: Digest = job_input("sft")
    """Data set of purpose sft."""
    resources: Resources = Resources()
    """Placement of the job."""


class RewardJob(RewardSettings, TrainJob):
    """Reward model training."""

    version: ClassVar[int] = 2  # normalises over prompts, not over pairs
    module: ClassVar[str] = "rlhf_core.algorithms.reward"
    kind: ClassVar[str] = "reward_model"
    excluded_from_key: ClassVar[frozenset[str]] = BaseJob.excluded_from_key | {
        "min_heldout_accuracy", "members", "combine", "std_coef", "member_weights"
    }  # fmt: skip

    algorithm: Literal["reward"] = "reward"
    """Name of the algorithm."""
    model: Digest = job_input()
    """SFT model whose weights the reward model starts from."""
    data: Digest = job_input("preference")
    """Data set of purpose preference."""
    resources: Resources = Resources()
    """Placement of the job."""
