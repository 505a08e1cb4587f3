"""Estimates the memory that a training stage needs on each rank. Does not import torch.

Bytes per trained parameter on N ranks; c is 2 for bf16 and fp16, 4 for fp32:

                weights   gradients      master + Adam   at the step
    ddp         4         4              8               c if half (autocast's copies)
    zero1       c         c              12/N            4/N if half
    zero2       c         c/N            12/N            4/N if half, and two buckets of 12 M
    zero2_cpu   c         c/N            on the host     the same
    fsdp2       4/N       4/N            8/N             embedding and two layers, gathered

A frozen parameter costs 4 bytes under ddp (fp32 weights), c under ZeRO and 4/N under FSDP2.
Each rank has complete copies of reference and reward model, 4 or c bytes per parameter.

Activations of one layer and one token, kept for the backward pass:

    24 d  (two norms in fp32)  +  c (7 q + 4 f)  (projections, attention and MLP)
    + heads S (4 + 2c) where attention keeps its scores (bloom)

d is the hidden size, q the width of all query heads, f the width of the MLP, S the tokens of a
sequence. Gradient checkpointing keeps c d per layer (4 d under ddp) and one complete layer. Trained
layers count, and all layers above the lowest of them. Logits are computed in chunks of 32 MiB on a
CPU and 512 MiB on a GPU, three times (logits, softmax, gradient).

Not included: fragmentation, communication buffers beyond the buckets, unused memory of the
allocator. On one CPU rank with the 135 M model, the estimate was 0.82 to 1.15 of the measured peak
(some combinations of SFT, reward, PPO with ddp, zero1, zero2: see
tests/rlhf_core/preflight/test_memory.py). It was not measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf_core.jobs import Resources, TrainSettings, VllmRollout, job_class
from rlhf_core.model_files.shape import ModelShape, read_shape

GIB = 2**30

_CHUNK = {"cpu": 2**23, "cuda": 2**27}  # logits at once, see rlhf_core.nn.response_logprobs
_BUCKET = 12 * 2**20  # elements that ZeRO-2 reduces at once
_PROCESS = {"cpu": int(0.8 * GIB), "cuda": int(1.0 * GIB)}  # imports; CUDA context and libraries
_DECODED_TOGETHER = 64  # rows, see rlhf_core.rollout.generate.generate


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per rank.

    Attributes:
        parts: name -> bytes on the device (the host's memory where the device is a CPU).
        host: bytes in the host's memory per rank when the device is a GPU, else 0.
    """

    parts: dict[str, int] = field(default_factory=dict)
    host: int = 0

    @property
    def total(self) -> int:
        """Bytes on the device, per rank."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{k} {v / GIB:.2f}" for k, v in self.parts.items() if v > 0)
        return f"{self.total / GIB:.1f} GiB per rank ({parts})"


def estimate(
    model_config: Mapping[str, Any],
    settings: TrainSettings,
    resources: Resources,
    stage: str,
    *,
    max_length: int = 512,
    device: Literal["cpu", "cuda"] = "cuda",
) -> MemoryEstimate:
    """Memory that a stage needs on each rank at its peak, in bytes.

    Args:
        model_config: the model's config.json.
        max_length: tokens of the longest sequence, prompt and reply together.

    Raises:
        KeyError: the config lacks a size that all language models have.
    """
    shape = read_shape(model_config)
    plan = _Plan(shape, settings, resources, device)
    policy = plan.states(shape.parameters)
    critic = plan.states(shape.backbone_parameters)
    sequences = resources.micro_batch_size
    chunk = plan.chunk()
    job = job_class(stage)
    samples = "prompts" in job.roles().values()
    # Chosen and rejected reply are in one forward pass.
    rows = 2 if "preference" in job.roles().values() else 1
    models = 2 if hasattr(settings, "value_coef") else 1  # with a critic
    if job.kind == "reward_model":
        parts = {**critic, "activations": plan.activations(rows * sequences, max_length)}
    elif samples:
        parts = {name: policy[name] + (models - 1) * critic[name] for name in policy}
        parts["reference and reward model"] = plan.frozen_models()
        kept = models * plan.activations(sequences, max_length)  # kept until the backward pass
        replies = settings.batch_size * getattr(settings, "group_size", 1)
        cache = plan.kv_cache(-(-replies // resources.ranks), max_length)
        parts["activations"] = max(kept, cache)  # a rollout keeps no activations
        parts["logits"] = chunk
        rollout = getattr(settings, "rollout", None)
        if isinstance(rollout, VllmRollout) and device == "cpu":  # on a GPU it sleeps meanwhile
            parts["vLLM"] = plan.width * shape.parameters + rollout.cpu_cache_mib * 2**20
    else:
        kept = plan.activations(rows * sequences, max_length)
        parts = {**policy, "activations": kept, "logits": chunk}
    trained = plan.trained(shape.parameters) * models
    parts["process"] = _PROCESS[device]
    host = 0
    # A checkpoint gathers weights and Adam states in fp32 in the host's memory of every rank.
    copies = 12 * trained
    if device == "cpu":
        parts["checkpoint"] = max(0, copies - parts["activations"])
    else:
        host = _PROCESS["cpu"] + max(copies, 4 * shape.parameters * (2 + models if samples else 1))
        if resources.strategy == "zero2_cpu":
            host += 16 * trained // resources.ranks
    return MemoryEstimate({name: int(size) for name, size in parts.items()}, int(host))


def per_strategy(
    model_config: Mapping[str, Any],
    settings: TrainSettings,
    resources: Resources,
    stage: str,
    *,
    max_length: int = 512,
    device: Literal["cpu", "cuda"] = "cuda",
) -> dict[str, MemoryEstimate]:
    """The estimate for each strategy that supports the device."""
    names = ["ddp", "zero1", "zero2"] + (["zero2_cpu", "fsdp2"] if device == "cuda" else [])
    return {
        name: estimate(
            model_config, settings, resources.model_copy(update={"strategy": name}), stage,
            max_length=max_length, device=device,
        )
        for name in names
    }  # fmt: skip


@dataclass(frozen=True)
class _Plan:
    shape: ModelShape
    settings: TrainSettings
    resources: Resources
    device: str

    @property
    def width(self) -> int:
        """Bytes of a number in the training precision."""
        return 4 if self.settings.precision == "fp32" else 2

    @property
    def top(self) -> int:
        """Number of layers in the backward pass."""
        return min(self.settings.trainable_layers or self.shape.layers, self.shape.layers)

    def trained(self, parameters: int) -> int:
        shape, lora = self.shape, self.settings.lora
        if lora is not None:
            mlp = (3 if shape.gated else 2) * (shape.hidden + shape.intermediate)
            attention = 2 * (shape.hidden + shape.query) + 2 * (shape.hidden + shape.key_value)
            return lora.rank * (mlp + attention) * shape.layers
        if self.settings.trainable_layers is None:
            return parameters
        return self.top * shape.layer_parameters + shape.head_parameters

    def states(self, parameters: int) -> dict[str, int]:
        """Weights, gradients and optimizer states of one trained model."""
        trained, c, n = self.trained(parameters), self.width, self.resources.ranks
        # Adapters are additional weights; trainable layers are part of the model's.
        frozen = parameters if self.settings.lora is not None else max(0, parameters - trained)
        kind, half = self.resources.strategy, c == 2
        on_host = kind == "zero2_cpu"
        if kind == "ddp":
            return {
                "weights": 4 * (trained + frozen) + (c * trained if half else 0),
                "gradients": 4 * trained,
                "optimizer": 8 * trained,
            }
        if kind == "fsdp2":
            gathered = self.shape.embedding_parameters + 2 * self.shape.layer_parameters
            return {
                "weights": 4 * (trained + frozen) // n + c * gathered,
                "gradients": 4 * trained // n,
                "optimizer": 8 * trained // n,
            }
        gradients = c * trained if kind == "zero1" else c * trained // n + 2 * c * _BUCKET
        step = (4 if half else 0) * trained // n
        return {
            "weights": c * (trained + frozen),
            "gradients": min(gradients, 3 * c * trained),
            "optimizer": 0 if on_host else 12 * trained // n + step,
        }

    def frozen_models(self) -> int:
        """Reference and reward model; with trainable_layers and ddp they share the lower layers."""
        c = 4 if self.resources.strategy == "ddp" else self.width
        both = self.shape.parameters + self.shape.backbone_parameters
        if self.settings.lora is not None:
            both -= self.shape.parameters  # the reference is the policy without its adapters
        if self.settings.trainable_layers is not None and c == 4:
            # policy, reference, critic and reward model share the lower layers
            below = self.shape.parameters - self.trained(self.shape.parameters)
            both -= 3 * below
        return c * both

    def activations(self, sequences: int, length: int) -> int:
        """Activations that a forward pass keeps for its backward pass."""
        shape, c = self.shape, self.width
        tokens = sequences * length
        layer = 24 * shape.hidden + c * (7 * shape.query + 4 * shape.intermediate)
        if shape.keeps_scores:
            layer += shape.heads * length * (4 + 2 * c)
        if self.resources.gradient_checkpointing:
            kept = (4 if self.resources.strategy == "ddp" else c) * shape.hidden * self.top
            return tokens * (kept + layer)
        return tokens * layer * self.top

    def kv_cache(self, rows: int, length: int) -> int:
        rows = min(rows, _DECODED_TOGETHER)
        # Twice: the cache grows by concatenation.
        return 2 * rows * length * self.shape.layers * 2 * self.shape.key_value * self.width

    def chunk(self) -> int:
        rows = max(64, _CHUNK[self.device] // self.shape.vocabulary)
        return 3 * 4 * rows * self.shape.vocabulary


def ways_to_fit(
    model_config: Mapping[str, Any],
    settings: TrainSettings,
    resources: Resources,
    stage: str,
    available: int,
    *,
    max_length: int = 512,
    device: Literal["cpu", "cuda"] = "cuda",
) -> list[str]:
    """Settings with which a stage fits into `available` bytes per rank, the mildest first."""

    def fits(settings: TrainSettings, place: Resources) -> bool:
        found = estimate(model_config, settings, place, stage, max_length=max_length, device=device)
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
    names = ["zero1", "zero2"] + (["fsdp2", "zero2_cpu"] if device == "cuda" else [])
    for name in names:
        spread = saving.model_copy(update={"strategy": name})
        if name != resources.strategy and resources.ranks > 1 and fits(settings, spread):
            ways.append(f"strategy {name} with gradient_checkpointing true")
            break
    if settings.lora is None and settings.trainable_layers is None:
        layers = max(1, read_shape(model_config).layers // 4)
        if fits(settings.model_copy(update={"trainable_layers": layers}), saving):
            ways.append(f"trainable_layers {layers} with gradient_checkpointing true")
    return ways
