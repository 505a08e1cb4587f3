"""Limits of rollout engines, checked before one is started. No torch."""

from __future__ import annotations

import re
from importlib.util import find_spec

from rlhf_core.jobs import OnlineSettings, Resources, VllmRollout

MISSING = (
    "the package vllm is not installed, and the rollout type vllm needs it (extra vllm); run: pip "
    "install 'vllm>=0.32,<0.33' where there is a GPU, or on a CPU what docs/training.md says, or "
    "set the rollout type builtin"
)


OLDEST = (0, 32)  # version whose interface is used


def version_problem(version: str) -> str | None:
    """What is wrong with a version of vLLM, if it is too old."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) >= OLDEST:
        return None
    return (
        f"this vLLM is {version}, and rollouts need 0.32 or newer; run: pip install "
        "'vllm>=0.32,<0.33', or set the rollout type builtin"
    )


LOWEST_TEMPERATURE = 0.01  # vLLM raises lower ones to this


def rollout_problems(
    stage: str,
    settings: OnlineSettings,
    resources: Resources,
    *,
    device: str | None = None,
    heads: int | None = None,
) -> list[str]:
    """Settings that vLLM does not support.

    Args:
        device: cpu or cuda, if it is known. heads: attention heads of the model, if known.
    """
    problems = []
    assert isinstance(settings.rollout, VllmRollout)
    problems += _parallel_problems(
        f"{stage}.rollout.tensor_parallel",
        settings.rollout,
        resources,
        device,
        heads,
    )
    if settings.temperature < LOWEST_TEMPERATURE:
        problems.append(
            f"{stage}.temperature is {settings.temperature:g}, and vLLM samples at no less than "
            f"{LOWEST_TEMPERATURE:g}: raise it, or set {stage}.rollout.type to builtin"
        )
    return problems


def _parallel_problems(
    name: str, rollout: VllmRollout, resources: Resources, device: str | None, heads: int | None
) -> list[str]:
    size = rollout.tensor_parallel
    if size == 1:
        return []
    problems = []
    if device == "cpu":
        problems.append(
            f"{name} is {size}, which needs GPUs, and these ranks run on the CPU; set 1"
        )
    if resources.ranks % size and not rollout.separate:
        problems.append(
            f"{name} is {size}, which does not divide the {resources.ranks} ranks of a node: an "
            "engine's GPUs are those of neighbouring ranks of one node; set a divisor of "
            f"{resources.ranks}"
        )
    if heads is not None and heads % size:
        problems.append(
            f"{name} is {size}, which does not divide the model's {heads} attention heads; set a "
            "divisor of both"
        )
    return problems


def path_remark() -> str | None:
    """What vLLM's CPU build does in this environment, because of its path; None for other paths.

    It puts the path of torch's OpenMP library into LD_PRELOAD, where a space or a colon ends a
    path. Measured with 0.32: the engine itself samples, but every program that the process starts
    from then on gets two lines of ld.so's errors on stderr, and not the library.
    """
    spec = find_spec("torch")
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    for place in places:
        if " " in place or ":" in place:
            found = "a space" if " " in place else "a colon"
            return (
                f"torch is installed in {place!r}, whose path has {found}, and vLLM on a CPU puts "
                "that path into LD_PRELOAD, where it ends there: programs that the ranks start "
                "print errors of ld.so, and vLLM's worker processes run without the OpenMP library "
                "by which they use all cores; make the environment (.venv) in a folder without one"
            )
    return None
