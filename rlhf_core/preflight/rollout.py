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
    """Problems if a GPU cannot hold the trainer's state and the engine's share together."""
    rollout = getattr(settings, "rollout", None)
    if not isinstance(rollout, VllmRollout) or device_of(resources, machine) == "cpu":
        return []
    if rollout.separate:  # on GPUs of their own
        return []
    kept = sum(v for k, v in training.parts.items() if k not in _DURING_PASSES)
    share = rollout.gpu_memory_utilization * machine.gpu_memory
    if not machine.gpu_memory or kept + share <= machine.gpu_memory:
        return []
    return [
        f"{stage}.rollout.gpu_memory_utilization is {rollout.gpu_memory_utilization:g}, which is "
        f"{share / GIB:.1f} GiB of a GPU of {machine.gpu_memory / GIB:.1f} GiB, but while vLLM "
        f"samples the trainer keeps about {kept / GIB:.1f} GiB; set at most "
        f"{max(0.0, 1 - kept / machine.gpu_memory):.2f}, or use more ranks with zero2, or LoRA"
    ]
