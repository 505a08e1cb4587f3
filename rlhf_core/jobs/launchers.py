"""Launchers: how stages are started."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rlhf_core.jobs.base import LARGEST, Settings

Priority = Literal["high", "normal", "low"]


class LocalLauncher(Settings):
    """Runs a stage with torchrun on this machine, as a child of the flow's process."""

    type: Literal["local"] = "local"
    """Type of the launcher."""


class WorkPoolLauncher(Settings):
    """Runs a stage as a flow run of its own on a GPU work pool. Pipeline and worker share the
    store, no disk."""

    type: Literal["work_pool"] = "work_pool"
    """Type of the launcher."""
    deployment: str = "rlhf-job/gpu-job"
    """Deployment of the flow that runs one job, as FLOW/DEPLOYMENT."""
    queue_timeout: Annotated[int, Field(ge=10, le=LARGEST)] = 86_400
    """Seconds that a stage waits for a free slot of the pool before it fails."""


Launcher = LocalLauncher | WorkPoolLauncher
