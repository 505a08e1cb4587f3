"""Launchers: how stages are started."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rlhf_core.jobs.base import LARGEST, Resources, Settings

Priority = Literal["high", "normal", "low"]


class LauncherSettings(Settings):
    """Base of the launchers."""

    several_nodes: ClassVar[bool] = False  # whether a stage may run on more than one

    @classmethod
    def nodes_problem(cls, resources: Resources, setting: str) -> str | None:
        """Why a stage cannot run on as many nodes as it asks for; None if it can."""
        if cls.several_nodes or resources.nodes == 1:
            return None
        kind = cls.model_fields["type"].default
        return (
            f"{setting}.nodes is {resources.nodes}, but launcher.type is {kind}, which runs a "
            "stage on one machine; set nodes to 1, or launcher.type to slurm or kubernetes"
        )


class LocalLauncher(LauncherSettings):
    """Runs a stage with torchrun on this machine, as a child of the flow's process."""

    type: Literal["local"] = "local"
    """Type of the launcher."""


class WorkPoolLauncher(LauncherSettings):
    """Runs a stage as a flow run of its own on a GPU work pool. Pipeline and worker share the
    store, no disk."""

    type: Literal["work_pool"] = "work_pool"
    """Type of the launcher."""
    deployment: str = "rlhf-job/gpu-job"
    """Deployment of the flow that runs one job, as FLOW/DEPLOYMENT."""
    queue_timeout: Annotated[int, Field(ge=10, le=LARGEST)] = 86_400
    """Seconds that a stage waits for a free slot of the pool before it fails."""


Launcher = LocalLauncher | WorkPoolLauncher
