"""What keeps a rollout backend from being used, as far as it can be known before. No torch here."""

from __future__ import annotations

from importlib.util import find_spec

from rlhf_core import recipe
from rlhf_core.jobs import OnlineSettings, PipelineConfig, Resources, VllmRollout
from rlhf_core.machine import Machine
from rlhf_core.memory import GIB, MemoryEstimate
from rlhf_core.preflight_settings import device_of, placements

MISSING = (
    "the package vllm is not installed, and the rollout type vllm needs it (extra vllm); run: pip "
    "install 'vllm>=0.32,<0.33' where there is a GPU, or on a CPU what docs/training.md says, or "
    "set the rollout type builtin"
)
LOWEST_TEMPERATURE = 0.01  # vLLM takes lower ones for this


def check_rollouts(config: PipelineConfig, *, packages: bool) -> list[str]:
    """Problems of the stages that sample.

    Args:
        packages: whether the stages will run in this environment.
    """
    problems = []
    for stage, resources in placements(config).items():
        settings = recipe.section(config, stage) if stage in config.stages else None
        if isinstance(settings, OnlineSettings) and isinstance(settings.rollout, VllmRollout):
            problems += rollout_problems(stage, settings, resources)
            if packages and find_spec("vllm") is None:
                problems.append(MISSING)
    return list(dict.fromkeys(problems))


def rollout_problems(stage: str, settings: OnlineSettings, resources: Resources) -> list[str]:
    """Settings that vLLM cannot do."""
    problems = []
    if settings.temperature < LOWEST_TEMPERATURE:
        problems.append(
            f"{stage}.temperature is {settings.temperature:g}, and vLLM samples at no less than "
            f"{LOWEST_TEMPERATURE:g}: raise it, or set {stage}.rollout.type to builtin"
        )
    if resources.strategy == "gemini":
        problems.append(
            f"{stage}.rollout.type is vllm with the strategy gemini, which keeps no whole weights "
            "on a rank to hand over: use zero2, or the rollout type builtin"
        )
    return problems


def check_engine_memory(
    stage: str, settings: object, resources: Resources, training: MemoryEstimate, machine: Machine
) -> list[str]:
    """Whether a GPU holds the trainer's state and the engine's share at the same time."""
    rollout = getattr(settings, "rollout", None)
    if not isinstance(rollout, VllmRollout) or device_of(resources, machine) == "cpu":
        return []
    kept = sum(v for k, v in training.parts.items() if k not in ("activations", "logits"))
    share = rollout.gpu_memory_utilization * machine.gpu_memory
    if not machine.gpu_memory or kept + share <= machine.gpu_memory:
        return []
    return [
        f"{stage}.rollout.gpu_memory_utilization is {rollout.gpu_memory_utilization:g}, which is "
        f"{share / GIB:.1f} GiB of a GPU of {machine.gpu_memory / GIB:.1f} GiB, but while vLLM "
        f"samples the trainer keeps about {kept / GIB:.1f} GiB; set at most "
        f"{max(0.0, 1 - kept / machine.gpu_memory):.2f}, or use more ranks with zero2, or LoRA"
    ]
