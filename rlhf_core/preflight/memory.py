"""Estimates the memory that a training stage needs on each rank. Does not import torch.

Bytes per trained parameter on N ranks; c is 2 for bf16 and fp16, 4 for fp32:

                weights   gradients   master + Adam   in the layers' passes   at the step
    ddp         4         4           8               c if half (casts)       -
    zero1       c         c           12/N            -                       4/N if half
    zero2       c         c/N         12/N            two buckets             4/N if half
    zero2_cpu   c         c/N         on the host     two buckets             -
    fsdp2       4/N       4/N         8/N             c of what is gathered   -

fsdp2 gathers embedding and head for a whole pass, and layers one by one. A frozen parameter costs
4 bytes under ddp (2 beside adapters in bf16 on a GPU), c under ZeRO, 4/N under fsdp2, and 4.127
bits with quantization nf4, which leaves embedding, head and norms in c bytes. Reference and reward
model cost c bytes per parameter (4 under ddp without adapters), c/N under fsdp2.

What a forward and backward pass needs beside that: see `rlhf_core.preflight.activations`. Added
is the most that is needed at once: by the vocabulary head, by one layer's backward pass, or by the
optimizer step.

Compared with a simulation of 0.1B to 70B parameters, see `benchmarks.memory`, which does not know
the fixed part of a process, fragmentation and the kernels' own workspaces.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf_core.jobs import (
    BuiltinRollout,
    Resources,
    Rollout,
    TrainSettings,
    VllmRollout,
    job_class,
)
from rlhf_core.model_files.shape import read_shape
from rlhf_core.pipeline.placements import response_tokens
from rlhf_core.preflight.states import Plan

GIB = 2**30

_PROCESS = {"cpu": int(0.8 * GIB), "cuda": int(1.0 * GIB)}  # imports; CUDA context and libraries


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per rank.

    Attributes:
        parts: name -> bytes on the device (the host's memory where the device is a CPU).
        host: bytes in the host's memory per rank when the device is a GPU, else 0.
        host_once: of one rank alone beside that, which reads models or gathers the result.
        samplers: in the host's memory, of all processes that sample beside the ranks, and of the
            weights that are on their way to them.
        sampler: on the GPU of each process that samples beside the ranks by the built-in loop.
        engine: of the weights alone in a vLLM engine, on each of its GPUs.
    """

    parts: dict[str, int] = field(default_factory=dict)
    host: int = 0
    host_once: int = 0
    samplers: int = 0
    sampler: int = 0
    engine: int = 0

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
    quantization: str | None = None,
    reward_models: int = 1,
    teacher: Mapping[str, Any] | None = None,
) -> MemoryEstimate:
    """Memory that a stage needs on each rank at its peak, in bytes.

    Args:
        model_config: the model's config.json.
        max_length: tokens of the longest sequence, prompt and reply together.
        quantization: of frozen weights, as model.quantization; default: a job's own.
        reward_models: that score the rollouts of an online stage.
        teacher: config.json of a distillation's teacher. None: it is as large as the model.

    Raises:
        KeyError: the config lacks a size that all language models have.
    """
    shape = read_shape(model_config)
    quantization = quantization or getattr(settings, "quantization", None)
    plan = Plan(shape, settings, resources, device, quantization, reward_models)
    job = job_class(stage)
    # Chosen and rejected reply are in one forward pass.
    pairs = "preference" in job.roles().values()
    tokens = (2 if pairs else 1) * resources.micro_batch_size * max_length
    samples = "prompts" in job.roles().values()
    models = 2 if hasattr(settings, "value_coef") else 1  # with a critic
    scalar = job.kind == "reward_model"
    policy, critic = plan.states(shape.parameters), plan.states(shape.backbone_parameters)
    both = {name: policy[name] + critic[name] for name in policy}
    parts = both if models == 2 else critic if scalar else policy
    if distils := "teacher" in job.roles():
        parts["teacher"] = plan.teacher(read_shape(teacher or model_config))
    elif samples:
        parts["reference and reward model"] = plan.frozen_models(models)
    kept = models * plan.passes.kept(tokens, max_length)
    parts["gathered"] = models * plan.gathered(layers=False)
    parts["activations"] = kept
    reply = min(max_length, response_tokens(settings) or max_length)
    predicted = 0 if scalar else tokens // max_length * reply
    parts["working memory"] = plan.working(tokens, max_length, models, predicted)
    parts |= {"divergence": plan.divergence(predicted)} if distils else {}
    if samples:
        parts |= sampling_parts(plan, max_length, kept + parts["working memory"])
    parts["process"] = _PROCESS[device]
    host = once = 0
    if device == "cpu":  # the copy is there while the next steps run
        parts["checkpoint"] = plan.checkpoint(models * plan.trained(shape.parameters))
    else:
        host, once = plan.host(models)
        host += _PROCESS["cpu"]
    parts = {name: int(size) for name, size in parts.items()}
    beside = (samplers_memory(plan, max_length), *sampling_gpus(plan, max_length))
    return MemoryEstimate(parts, *map(int, (host, once, *beside)))


def sampling_parts(plan: Plan, max_length: int, during_passes: int) -> dict[str, int]:
    """What a rank needs to sample, bytes, beside what it needs in a training pass: a rollout keeps
    no activations."""
    engine: Rollout = getattr(plan.settings, "rollout", BuiltinRollout())
    if engine.separate:
        return {}
    rows = -(-most_replies(plan.settings) // plan.resources.world_size)
    found = {"rollout": max(0, plan.rollout(rows, max_length) - during_passes)}
    if isinstance(engine, VllmRollout) and plan.device == "cpu":  # on a GPU it sleeps meanwhile
        found["vLLM"] = plan.width * plan.shape.parameters + engine.cpu_cache_mib * 2**20
    return found


def samplers_memory(plan: Plan, max_length: int) -> float:
    """Main memory of the processes that sample beside the ranks, bytes; 0 where there are none."""
    shape, engine = plan.shape, getattr(plan.settings, "rollout", BuiltinRollout())
    if not engine.separate:
        return 0.0
    each: float = _PROCESS["cpu"]
    if plan.device == "cpu":
        each += 4 * shape.parameters
        if isinstance(engine, VllmRollout):
            each += engine.cpu_cache_mib * 2**20
        else:
            each += plan.rollout(rows_of_sampler(plan), max_length)
    elif not isinstance(engine, VllmRollout):  # it loads the policy in main memory
        each += plan.loaded_width * shape.parameters
    whole = isinstance(engine, VllmRollout)  # else what is trained
    each *= 1 + (engine.gpus // engine.ranks if engine.gpus > engine.ranks else 0)  # its workers
    handed = 4 * (shape.parameters if whole else plan.trained(shape.parameters))
    return engine.ranks * each + (engine.max_staleness + 2) * handed


def sampling_gpus(plan: Plan, max_length: int) -> tuple[float, float]:
    """What samples on GPUs, bytes: `sampler` and `engine` of the estimate."""
    engine: Rollout = getattr(plan.settings, "rollout", BuiltinRollout())
    parameters, ddp = plan.shape.parameters, plan.resources.strategy == "ddp"
    if plan.device == "cpu":
        return 0.0, 0.0
    if isinstance(engine, VllmRollout):
        return 0.0, plan.width * parameters / engine.tensor_parallel
    if not engine.separate:
        return 0.0, 0.0
    weights = plan.width * parameters
    if ddp:  # as it is trained, and what autocast keeps of it
        frozen = plan.settings.lora is not None
        held = plan.frozen(parameters) if frozen else 4 * parameters
        weights = held + (plan.width * parameters if plan.width == 2 and held > weights else 0)
    rows = rows_of_sampler(plan)
    return weights + plan.rollout(rows, max_length) + _PROCESS["cuda"], 0.0


def rows_of_sampler(plan: Plan) -> int:
    """Replies that each process samples together beside the ranks."""
    engine: Rollout = getattr(plan.settings, "rollout", BuiltinRollout())
    return -(-most_replies(plan.settings) * engine.segments // engine.ranks)


def most_replies(settings: TrainSettings) -> int:
    """Replies that all ranks sample together, in training or in an evaluation."""
    replies: int = getattr(settings, "replies", settings.batch_size)
    evaluates = getattr(settings, "eval_every", None) is not None
    return max(replies, getattr(settings, "eval_prompts", 0) if evaluates else 0)
