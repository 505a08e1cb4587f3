"""How large the measured models, rows and batches are: on a GPU, and small ones to try the script.

Tokens, unless a comment says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Run:
    """One way to train the large model in SFT."""

    micro_batch: int  # rows
    checkpointing: bool = False
    mixed: bool = False  # rows of a tenth of the length up to the length
    strategy: str = "ddp"
    fast_paths: bool = True
    memory: int = 0  # bytes that the device must have

    @property
    def name(self) -> str:
        parts = [self.strategy, f"micro-batch {self.micro_batch}"]
        parts += ["checkpointing"] * self.checkpointing + ["mixed lengths"] * self.mixed
        parts += ["without fast paths"] * (not self.fast_paths)
        return ", ".join(parts)


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    large: dict[str, Any]  # llama configurations
    medium: dict[str, Any]
    products: tuple[int, ...]  # n of an (n,n) x (n,n) product
    copied: int  # bytes of the copy that measures the memory's bandwidth
    length: int  # of a row in SFT
    batch: int  # rows of an SFT step
    warm_up: int  # steps before the measured ones
    steps: int
    runs: tuple[Run, ...]
    prompt: int
    reply: int
    rollout: tuple[int, ...]  # replies that are decoded together
    ppo_batch: int  # replies
    ppo_micro: int
    oom_length: int
    oom_micro: int


def llama(layers: int, width: int, heads: int, shared: int, inner: int, words: int) -> Any:
    """A llama's configuration; `shared` heads have keys and values."""
    return {
        "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads,
        "num_key_value_heads": shared, "intermediate_size": inner, "vocab_size": words,
        "max_position_embeddings": 4096,
    }  # fmt: skip


GIB = 2**30
GPU = Sizes(
    large=llama(16, 2048, 32, 8, 8192, 32_768),  # 1.1 billion parameters
    medium=llama(12, 768, 12, 4, 3072, 8192),  # 0.12 billion
    products=(2048, 4096, 8192, 16_384),
    copied=4 * GIB,
    length=2048,
    batch=16,
    warm_up=2,
    steps=4,
    runs=(
        Run(8),
        Run(4),
        Run(16, memory=130 * GIB),
        Run(8, checkpointing=True),
        Run(16, checkpointing=True),
        Run(8, mixed=True),
        Run(8, strategy="fsdp2"),
        Run(8, fast_paths=False),
    ),
    prompt=256,
    reply=256,
    rollout=(64, 256),
    ppo_batch=64,
    ppo_micro=8,
    oom_length=1024,
    oom_micro=16,
)
CPU = Sizes(
    large=llama(2, 64, 4, 2, 128, 512),
    medium=llama(2, 64, 4, 2, 128, 512),
    products=(256, 512),
    copied=2**26,
    length=64,
    batch=4,
    warm_up=1,
    steps=2,
    runs=(Run(4), Run(2, checkpointing=True), Run(4, mixed=True), Run(4, strategy="fsdp2")),
    prompt=16,
    reply=8,
    rollout=(8,),
    ppo_batch=4,
    ppo_micro=2,
    oom_length=32,
    oom_micro=4,
)
