"""Checks the rollout backends of a configuration. Does not import torch."""

from __future__ import annotations

from importlib.util import find_spec

from rlhf_core.jobs import OnlineSettings, PipelineConfig, Resources, VllmRollout
from rlhf_core.model_files.shape import ModelShape
from rlhf_core.pipeline import recipe
from rlhf_core.pipeline.placements import device_of, placements
from rlhf_core.preflight.memory import GIB, MemoryEstimate
from rlhf_core.rollout.limits import MISSING, path_remark, rollout_problems
from rlhf_core.system.machine import Machine

_DURING_PASSES = ("activations", "working memory", "gathered")  # parts that sampling does not need
_BESIDE_WEIGHTS = 0.05  # share of a GPU that an engine needs beside its weights, at the least


def check_rollouts(
    config: PipelineConfig, shape: ModelShape | None, machine: Machine | None, *, packages: bool
) -> list[str]:
    """Problems of the stages that sample.

    Args:
        shape: of the model, if it is known. machine: that they run on, if it is this one.
        packages: whether the stages will run in this environment.
    """
    problems = []
    heads = None if shape is None else shape.heads
    for stage, resources in placements(config).items():
        settings = recipe.section(config, stage) if stage in config.stages else None
        if isinstance(settings, OnlineSettings) and isinstance(settings.rollout, VllmRollout):
            device = None if machine is None else device_of(resources, machine)
            problems += rollout_problems(stage, settings, resources, device=device, heads=heads)
            if packages and find_spec("vllm") is None:
                problems.append(MISSING)
    return list(dict.fromkeys(problems))


def remarks_on_rollouts(config: PipelineConfig, machine: Machine) -> list[str]:
    """What a person should know of the stages that sample by vLLM in this environment."""
    for stage, resources in placements(config).items():
        settings = recipe.section(config, stage) if stage in config.stages else None
        samples = isinstance(settings, OnlineSettings) and isinstance(settings.rollout, VllmRollout)
        if samples and device_of(resources, machine) == "cpu":
            remark = path_remark()
            return [] if remark is None else [remark]
    return []


def check_engine_memory(
    stage: str, settings: object, resources: Resources, training: MemoryEstimate, machine: Machine
) -> list[str]:
    """Problems if a GPU cannot hold what samples on it: a sampler of its own, an engine's weights,
    or the engine beside the trainer's state."""
    rollout, gpu = getattr(settings, "rollout", None), machine.gpu_memory
    if rollout is None or not gpu or device_of(resources, machine) == "cpu":
        return []
    if not isinstance(rollout, VllmRollout):
        return _sampler_problems(stage, training.sampler, gpu)
    # Nothing else is on the GPUs of samplers.
    kept = sum(v for k, v in training.parts.items() if k not in _DURING_PASSES)
    kept = 0 if rollout.separate else kept
    share, name = rollout.gpu_memory_utilization * gpu, f"{stage}.rollout.gpu_memory_utilization"
    found = (
        f"{name} is {rollout.gpu_memory_utilization:g}, which is {share / GIB:.1f} GiB of a GPU of "
        f"{gpu / GIB:.1f} GiB"
    )
    if training.engine >= share:
        needed = training.engine / gpu + _BESIDE_WEIGHTS
        ways = [f"set it to {needed:.2f} or more"] if kept + needed * gpu <= gpu else []
        ways.append("raise rollout.tensor_parallel")
        return [
            f"{found}, but the weights alone take about {training.engine / GIB:.1f} GiB of it: "
            f"{', or '.join([*ways, 'train a smaller model'])}"
        ]
    if kept + share <= gpu:
        return []
    return [
        f"{found}, but while vLLM samples the trainer keeps about {kept / GIB:.1f} GiB; set at "
        f"most {max(0.0, 1 - kept / gpu):.2f}, or use more ranks with zero2 or fsdp2, or LoRA"
    ]


def _sampler_problems(stage: str, needed: int, gpu: int) -> list[str]:
    if needed <= gpu:
        return []
    return [
        f"{stage}.rollout.placement is separate, where each sampler has the whole policy on one "
        f"GPU: about {needed / GIB:.1f} GiB, and a GPU has {gpu / GIB:.1f} GiB; set placement to "
        "colocated with the strategy fsdp2, or use a smaller model or shorter replies"
    ]
