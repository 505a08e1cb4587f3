"""Launchers: they start, watch and cancel torchrun jobs, and collect their results."""

from tasks.launchers.base import Launch, Launcher, Outcome
from tasks.launchers.local import LocalTorchrun

__all__ = ["Launch", "Launcher", "LocalTorchrun", "Outcome", "launcher_for"]


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
