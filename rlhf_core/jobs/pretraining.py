"""Language modelling on plain text: a model from scratch, and (continued) pretraining."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

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
from rlhf_core.jobs.sources import Source
from rlhf_core.jobs.training import HeldOutJob, HeldOutSettings

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)  # every byte has a token of its own


class NewModelSettings(Settings):
    """An untrained model with a tokenizer trained on the text. The defaults give 10 M
    parameters."""

    architecture: Literal["llama", "qwen2", "gpt2"] = "llama"
    """Architecture of the decoder."""
    hidden_size: PositiveInt = 320
    """Hidden size, a multiple of heads."""
    layers: PositiveInt = 6
    """Number of transformer layers."""
    heads: PositiveInt = 5
    """Number of attention heads."""
    vocabulary: Annotated[int, Field(ge=SMALLEST_VOCABULARY, le=LARGEST)] = 8192
    """Largest vocabulary of the byte-level BPE tokenizer, special tokens included. A short text
    gives fewer tokens."""
    max_length: Annotated[int, Field(ge=2, le=LARGEST)] = 1024
    """Context length in tokens."""
    tie_embeddings: bool = True
    """Share the weights of the token embedding with the vocabulary head."""

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> Self:
        width, rest = divmod(self.hidden_size, self.heads)
        rotary = self.architecture != "gpt2"
        if rest or (rotary and width % 2):
            kind = "an even multiple" if rotary else "a multiple"
            raise ValueError(
                f"hidden_size is {self.hidden_size}, but must be {kind} of heads, which is "
                f"{self.heads}: use {self.heads * (width + width % 2 or 2)}, for example"
            )
        return self


class NewModelJob(NewModelSettings, BaseJob):
    """Makes a model from scratch: tokenizer from the text, weights from the seed."""

    module: ClassVar[str] = "rlhf_core.stages.new_model"
    kind: ClassVar[str] = "model"
    torchrun: ClassVar[bool] = False

    algorithm: Literal["new_model"] = "new_model"
    """Name of the algorithm."""
    text: Source
    """Text to train the tokenizer on; without the rows that it holds out."""
    fingerprint: str = ""
    """Fingerprint of the text, so that a changed file gives a new tokenizer."""

    def key_settings(self) -> dict[str, Any]:
        """Without the order of the text's rows, which no tokenizer depends on."""
        settings = super().key_settings()
        for part in settings["text"].get("mix", [settings["text"]]):
            del part["curriculum"]
        return settings


class PretrainSettings(HeldOutSettings):
    """Pretraining: next-token prediction on packed plain text, before the other stages."""

    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 5e-5
    """Peak learning rate. A model from scratch needs about ten times more."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    """AdamW weight decay (not on biases and norms)."""
    epochs: PositiveInt = 1
    """Epochs over the text. Each trains on every token once, or on the parts of a mixture."""
    max_steps: PositiveInt | None = None
    """Maximum number of optimizer steps. Empty: as many as the epochs need."""
    batch_size: PositiveInt = 32
    """Packed sequences per optimizer step over all ranks and micro-batches."""
    length: Annotated[int, Field(ge=2, le=LARGEST)] = 512
    """Length of a packed sequence in tokens, at most the model's context length."""


class PretrainJob(PretrainSettings, HeldOutJob):
    """Pretraining."""

    module: ClassVar[str] = "rlhf_core.algorithms.pretrain"
    kind: ClassVar[str] = "model"

    algorithm: Literal["pretrain"] = "pretrain"
    """Name of the algorithm."""
    model: Digest = job_input()
    """Model to start from: an imported or a new one."""
    data: Digest = job_input("pretrain")
    """Data set of purpose pretrain."""
    resources: Resources = Resources()
    """Placement of the job."""
