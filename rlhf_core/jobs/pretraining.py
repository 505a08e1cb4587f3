"""Language modelling on plain text: a model made from nothing, and (continued) pretraining."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rlhf_core.jobs.base import (
    LARGEST,
    BaseJob,
    Digest,
    PositiveInt,
    Resources,
    Settings,
    job_input,
)
from rlhf_core.jobs.data import DataSettings
from rlhf_core.jobs.training import TrainSettings

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)  # every byte has a token of its own


class NewModelSettings(Settings):
    """An untrained model with a tokenizer made from the text; the defaults give 10 M parameters."""

    architecture: Literal["llama", "qwen2", "gpt2"] = "llama"
    """Kind of decoder."""
    hidden_size: PositiveInt = 320
    """Width; a multiple of heads."""
    layers: PositiveInt = 6
    """Transformer layers."""
    heads: PositiveInt = 5
    """Attention heads."""
    vocabulary: Annotated[int, Field(ge=SMALLEST_VOCABULARY, le=LARGEST)] = 8192
    """Tokens of the byte-level BPE tokenizer at most, special ones included; a short text gives
    fewer."""
    max_length: Annotated[int, Field(ge=2, le=LARGEST)] = 1024
    """Longest sequence that the model can read, in tokens."""
    tie_embeddings: bool = True
    """Use the token embedding as vocabulary head too."""

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> Self:
        width, rest = divmod(self.hidden_size, self.heads)
        rotary = self.architecture != "gpt2"
        if rest or (rotary and width % 2):
            kind = "an even multiple" if rotary else "a multiple"
            raise ValueError(
                f"hidden_size is {self.hidden_size} and heads {self.heads}; needed is {kind} of "
                f"heads: take hidden_size {self.heads * (width + width % 2 or 2)}, say"
            )
        return self


class NewModelJob(NewModelSettings, BaseJob):
    """Makes a model from nothing: tokenizer from the text, weights from the seed."""

    module: ClassVar[str] = "rlhf_core.stages.new_model"
    kind: ClassVar[str] = "model"
    torchrun: ClassVar[bool] = False

    algorithm: Literal["new_model"] = "new_model"
    """Job kind."""
    text: DataSettings
    """Text that the tokenizer is made from; rows that it holds out are left out here too."""
    fingerprint: str = ""
    """Identity of the text's contents, so that a changed file gives a new tokenizer."""


class PretrainSettings(TrainSettings):
    """Pretraining: next-token prediction on packed plain text, before the other stages."""

    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 5e-5
    """Peak learning rate; a model made from nothing wants about ten times more."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    """AdamW weight decay (not on biases and norms)."""
    epochs: PositiveInt = 1
    """Passes over the text; each token is trained on once in each."""
    max_steps: PositiveInt | None = None
    """Optimizer steps at most; empty: as many as the epochs need."""
    batch_size: PositiveInt = 32
    """Packed sequences per optimizer step over all ranks and micro-batches."""
    length: Annotated[int, Field(ge=2, le=LARGEST)] = 512
    """Tokens of a packed sequence, at most as many as the model can read."""


class PretrainJob(PretrainSettings, BaseJob):
    """Pretraining."""

    module: ClassVar[str] = "rlhf_core.algorithms.pretrain"
    kind: ClassVar[str] = "model"

    algorithm: Literal["pretrain"] = "pretrain"
    """Job kind."""
    model: Digest = job_input()
    """Model to go on from: an imported or a new one."""
    data: Digest = job_input("pretrain")
    """Data set of purpose pretrain."""
    resources: Resources = Resources()
    """Placement."""
