"""What is simulated: models, strategies, lengths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from rlhf_core.jobs import (
    DPOSettings,
    LoRA,
    PPOSettings,
    Resources,
    RewardSettings,
    SFTSettings,
    TrainSettings,
)


def _llama(hidden: int, width: int, layers: int, heads: int, groups: int, words: int) -> Any:
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": width,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": groups,
        "vocab_size": words, "max_position_embeddings": 8192, "tie_word_embeddings": False,
    }  # fmt: skip


MODELS: dict[str, dict[str, Any]] = {
    # SmolLM2-135M, Llama 3.2 1B and 3B, LLaMA 7B and 13B, Llama 2 70B, BLOOM-560M
    "0.1B": _llama(576, 1536, 30, 9, 3, 49152) | {"tie_word_embeddings": True},
    "1B": _llama(2048, 8192, 16, 32, 8, 128256) | {"tie_word_embeddings": True},
    "3B": _llama(3072, 8192, 28, 24, 8, 128256) | {"tie_word_embeddings": True},
    "7B": _llama(4096, 11008, 32, 32, 32, 32000),
    "13B": _llama(5120, 13824, 40, 40, 40, 32000),
    "70B": _llama(8192, 28672, 80, 64, 8, 32000),
    "bloom-560m": {
        "model_type": "bloom", "hidden_size": 1024, "n_layer": 24, "num_attention_heads": 16,
        "vocab_size": 250880,
    },
}  # fmt: skip
SETTINGS: dict[str, type[TrainSettings]] = {
    "sft": SFTSettings, "dpo": DPOSettings, "reward": RewardSettings, "ppo": PPOSettings
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One training stage of one model.

    Attributes:
        rows: micro_batch_size: sequences, or pairs. length: tokens of each.
        tuning: full, lora (rank 16, all linear layers) or qlora.
    """

    model: str
    stage: str = "sft"
    strategy: str = "ddp"
    ranks: int = 1
    rows: int = 1
    length: int = 2048
    checkpointing: bool = False
    tuning: str = "full"

    @property
    def config(self) -> dict[str, Any]:
        """The model's config.json."""
        return MODELS[self.model]

    def settings(self) -> TrainSettings:
        """The stage's; one reply per rank, because rollouts are not simulated."""
        lora = None if self.tuning == "full" else LoRA(rank=16)
        batch = {"batch_size": self.ranks} if self.stage == "ppo" else {}
        return SETTINGS[self.stage](lora=lora, **batch)

    def resources(self) -> Resources:
        return Resources(
            ranks=self.ranks,
            strategy=self.strategy,  # type: ignore[arg-type]
            micro_batch_size=self.rows,
            gradient_checkpointing=self.checkpointing,
        )


def grid() -> Iterator[Case]:
    """All cases of the table."""
    ways = [("ddp", 1), ("zero1", 8), ("zero2", 8), ("fsdp2", 8), ("fsdp2", 64)]
    for model in MODELS:
        for saving in (False, True):
            case = Case(model, checkpointing=saving)
            for strategy, ranks in ways:
                yield replace(case, strategy=strategy, ranks=ranks)
            for strategy, ranks in (("ddp", 1), ("zero2", 8), ("fsdp2", 8)):
                yield replace(case, strategy=strategy, ranks=ranks, tuning="lora")
            yield replace(case, tuning="qlora")
    for rows, length in ((8, 512), (1, 8192)):
        for saving in (False, True):
            for strategy, ranks in (("ddp", 1), ("zero2", 4), ("fsdp2", 4)):
                yield Case("7B", "sft", strategy, ranks, rows, length, saving)
            yield Case("7B", "sft", "ddp", 1, rows, length, saving, "lora")
    for ranks in (2, 4, 64):
        for strategy in ("zero1", "zero2", "fsdp2"):
            yield Case("3B", "sft", strategy, ranks, 2, 2048, True)
    for stage in ("dpo", "reward", "ppo"):
        for strategy, ranks, tuning in (
            ("ddp", 1, "full"), ("zero2", 8, "full"), ("fsdp2", 8, "full"), ("ddp", 1, "lora"),
            ("ddp", 1, "qlora"),
        ):  # fmt: skip
            for saving in (False, True):
                yield Case("7B", stage, strategy, ranks, 2, 1024, saving, tuning)
        yield Case("0.1B", stage, "ddp", 1, 2, 1024, True)
        yield Case("0.1B", stage, "fsdp2", 8, 2, 1024, True)
    # docs/scale.md; its SFT is among the first.
    for stage, tuning in (("reward", "full"), ("ppo", "full"), ("sft", "lora"), ("ppo", "lora")):
        yield Case("70B", stage, "fsdp2", 64, checkpointing=True, tuning=tuning)
    # What the presets bloom-560m and llama-7b train; the latter's reward model is among these.
    for stage, length in (("sft", 512), ("reward", 512), ("ppo", 384)):
        yield Case("bloom-560m", stage, "zero2", 4, 4, length)
    for stage, length in (("sft", 1024), ("ppo", 1280)):
        yield Case("7B", stage, "fsdp2", 8, 2, length, True)
