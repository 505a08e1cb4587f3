"""Launchers: they start, watch and cancel torchrun jobs, and collect their results."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.launchers.base import Launch, Launcher, Outcome
from tasks.launchers.local import LocalTorchrun

if TYPE_CHECKING:
    from rlhf_core.jobs import PipelineConfig

__all__ = ["Launch", "Launcher", "LocalTorchrun", "Outcome", "check_launcher", "launcher_for"]


def check_launcher(config: PipelineConfig, remarks: list[str]) -> list[str]:
    """All problems that the launcher would have with a pipeline, part of the preflight.

    Args:
        remarks: what a person should know, though it is no problem, is added.
    """
    from rlhf_core.jobs.launchers import KubernetesLauncher, SlurmLauncher

    if isinstance(config.launcher, KubernetesLauncher):
        from tasks.launchers.kubernetes import preflight as kubernetes

        return kubernetes.check(config)
    if isinstance(config.launcher, SlurmLauncher):
        from tasks.launchers.slurm import preflight as slurm

        return slurm.check(config, remarks)
    return []


def launcher_for(settings: object) -> Launcher:
    """The launcher that a configuration's `launcher` section describes."""
    from rlhf_core.jobs.launchers import (
        KubernetesLauncher,
        LocalLauncher,
        SlurmLauncher,
        WorkPoolLauncher,
    )

    if isinstance(settings, WorkPoolLauncher):
        from tasks.launchers.work_pool import WorkPool

        return WorkPool(settings)
    if isinstance(settings, SlurmLauncher):
        from tasks.launchers.slurm import Slurm

        return Slurm(settings)
    if isinstance(settings, KubernetesLauncher):
        from tasks.launchers.kubernetes.launcher import Kubernetes

        return Kubernetes(settings)
    assert isinstance(settings, LocalLauncher), f"no launcher for {settings!r}"
    return LocalTorchrun()
