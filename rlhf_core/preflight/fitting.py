"""Which ways to train a model fit into a given memory: for `rlhf doctor`, and as advice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_core.jobs import LoRA, Resources, Strategy, TrainSettings
from rlhf_core.model_files.shape import read_shape
from rlhf_core.preflight.memory import MemoryEstimate, estimate

MOST_ROWS = 64  # micro-batches are not tried beyond
ADAPTERS = LoRA(rank=16)

Tuning = Literal["all weights", "LoRA", "QLoRA"]
Way = tuple[Tuning, Strategy]
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Fit:
    """The largest micro-batch of one way to train.

    Attributes:
        rows: micro_batch_size, a power of two; 0 where not even one row fits.
        need: memory with it, or with one row.
    """

    tuning: Tuning
    strategy: Strategy
    checkpointing: bool
    rows: int
    need: MemoryEstimate


def ways_to_train(ranks: int, device: Device) -> list[Way]:
    """What is trained, and by which strategy: all combinations that make sense."""
    ways: list[Way] = [("all weights", "ddp")]
    if ranks > 1:
        ways += [("all weights", "zero1"), ("all weights", "zero2"), ("all weights", "fsdp2")]
    if device == "cuda":
        ways.append(("all weights", "zero2_cpu"))
    ways.append(("LoRA", "ddp"))
    if ranks > 1:
        ways.append(("LoRA", "fsdp2"))
    return [*ways, ("QLoRA", "ddp")]


def largest_micro_batch(
    model_config: Mapping[str, Any],
    settings: TrainSettings,
    ranks: int,
    stage: str,
    available: int,
    way: Way,
    *,
    checkpointing: bool,
    max_length: int,
    device: Device,
) -> Fit:
    """The most rows per rank with which a stage fits into `available` bytes."""
    tuning, strategy = way
    if tuning != "all weights":
        settings = settings.model_copy(update={"lora": ADAPTERS})

    def need(rows: int) -> MemoryEstimate:
        place = Resources(
            ranks=ranks,
            strategy=strategy,
            micro_batch_size=rows,
            gradient_checkpointing=checkpointing,
        )
        return estimate(
            model_config, settings, place, stage, max_length=max_length, device=device,
            quantization="nf4" if tuning == "QLoRA" else None,
        )  # fmt: skip

    rows, found = 0, need(1)
    following = found
    while following.total <= available and rows < MOST_ROWS:
        rows, found = max(1, 2 * rows), following
        following = need(2 * rows)
    return Fit(tuning, strategy, checkpointing, rows, found)


def ways_to_fit(
    model_config: Mapping[str, Any],
    settings: TrainSettings,
    resources: Resources,
    stage: str,
    available: int,
    *,
    max_length: int = 512,
    device: Device = "cuda",
    quantization: str | None = None,
    reward_models: int = 1,
    teacher: Mapping[str, Any] | None = None,
) -> list[str]:
    """Settings with which a stage fits into `available` bytes per rank, the mildest first; the
    arguments are those of `estimate`."""
    quantization = quantization or getattr(settings, "quantization", None)

    def fits(
        settings: TrainSettings, place: Resources, quantization: str | None = quantization
    ) -> bool:
        found = estimate(
            model_config, settings, place, stage, max_length=max_length, device=device,
            quantization=quantization, reward_models=reward_models, teacher=teacher,
        )  # fmt: skip
        return found.total <= available

    ways = []
    micro = resources.micro_batch_size
    while micro > 1:
        micro //= 2
        if fits(settings, resources.model_copy(update={"micro_batch_size": micro})):
            ways.append(f"micro_batch_size {micro}")
            break
    saving = resources.model_copy(update={"gradient_checkpointing": True})
    if fits(settings, saving):
        ways.append("gradient_checkpointing true")
    names = ["zero1", "zero2", "fsdp2"] + (["zero2_cpu"] if device == "cuda" else [])
    for name in [] if quantization else names:
        spread = saving.model_copy(update={"strategy": name})
        if name != resources.strategy and resources.world_size > 1 and fits(settings, spread):
            ways.append(f"strategy {name} with gradient_checkpointing true")
            break
    if settings.trainable_layers is not None:
        return ways
    adapters = settings
    if settings.lora is None:
        layers = max(1, read_shape(model_config).layers // 4)
        if fits(settings.model_copy(update={"trainable_layers": layers}), saving):
            ways.append(f"trainable_layers {layers} with gradient_checkpointing true")
        adapters = settings.model_copy(update={"lora": ADAPTERS})
        if fits(adapters, saving):
            ways.append(f"lora {{rank: {ADAPTERS.rank}}} with gradient_checkpointing true")
            return ways
    alone = saving.model_copy(update={"strategy": "ddp"})  # quantised weights are not sharded
    if quantization is None and fits(adapters, alone, "nf4"):
        lora = "" if settings.lora else f"lora {{rank: {ADAPTERS.rank}}}, "
        ddp = "" if resources.strategy == "ddp" else "strategy ddp and "
        ways.append(f"{lora}model.quantization nf4 with {ddp}gradient_checkpointing true")
    return ways


def llama_like(parameters: int) -> dict[str, Any]:
    """config.json of a llama of about so many parameters.

    Layers are as many as the hidden size has 128s, as in LLaMA 7B and 13B (arXiv 2302.13971).
    """
    hidden = max(64, 64 * round((parameters * 128 / 12) ** (1 / 3) / 64))
    config = {
        "model_type": "llama", "hidden_size": hidden, "vocab_size": 32000,
        "intermediate_size": 64 * round(hidden * 8 / 3 / 64),
        "num_attention_heads": max(1, hidden // 64), "tie_word_embeddings": hidden < 2048,
    }  # fmt: skip
    one = read_shape({**config, "num_hidden_layers": 1})
    rest = parameters - (one.parameters - one.layer_parameters)
    return {**config, "num_hidden_layers": max(1, round(rest / one.layer_parameters))}
