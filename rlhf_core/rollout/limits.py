"""Limits of rollout engines, checked before one is started. No torch."""

from __future__ import annotations

from rlhf_core.jobs import OnlineSettings, Resources

MISSING = (
    "the package vllm is not installed, and the rollout type vllm needs it (extra vllm); run: pip "
    "install 'vllm>=0.32,<0.33' where there is a GPU, or on a CPU what docs/training.md says, or "
    "set the rollout type builtin"
)


LOWEST_TEMPERATURE = 0.01  # vLLM raises lower ones to this


def rollout_problems(stage: str, settings: OnlineSettings, resources: Resources) -> list[str]:
    """Settings that vLLM does not support."""
    problems = []
    if settings.temperature < LOWEST_TEMPERATURE:
        problems.append(
            f"{stage}.temperature is {settings.temperature:g}, and vLLM samples at no less than "
            f"{LOWEST_TEMPERATURE:g}: raise it, or set {stage}.rollout.type to builtin"
        )
    if resources.strategy == "fsdp2":
        problems.append(
            f"{stage}.rollout.type is vllm with the strategy fsdp2, which keeps no whole weights "
            "on a rank to hand over: use zero2, or the rollout type builtin"
        )
    return problems
