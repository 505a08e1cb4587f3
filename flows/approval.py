"""Manual approval before a model is published (`publish.approval: manual`)."""

from __future__ import annotations

import os
from typing import Literal

from prefect import runtime
from prefect.flow_runs import pause_flow_run, suspend_flow_run
from prefect.input import RunInput

from flows import server
from rlhf_core.errors import PreflightError
from rlhf_core.jobs import PipelineConfig


class Decision(RunInput):
    """The form on the run's page."""

    decision: Literal["approve", "reject"] = "approve"
    """Publish the model, or end the run without publishing."""
    reason: str = ""
    """Stored in the run's record."""


def check(config: PipelineConfig) -> None:
    """Refuse a run that nobody could approve.

    Raises:
        PreflightError: approval is manual and the Prefect server ends with the run.
    """
    pages = os.environ.get("PREFECT_API_URL") and server.temporary is None
    if config.publish.approval == "manual" and not pages:
        raise PreflightError(
            [
                "publish.approval is manual, but this run has a temporary Prefect server without "
                "pages; start a system with `make up`, or set publish.approval to none"
            ]
        )


def ask(config: PipelineConfig, report: str) -> Decision:
    """Pause the run until a person decides. On a worker the process exits, and starts again later.

    Args:
        report: Markdown shown above the form.

    Raises:
        prefect.exceptions.Pause: the process has to exit; the run continues when it is resumed.
        prefect.exceptions.FlowPauseTimeout: no decision within publish.approval_timeout.
    """
    form = Decision.with_initial_data(description=report)
    timeout = config.publish.approval_timeout
    if runtime.deployment.id:
        return suspend_flow_run(wait_for_input=form, timeout=timeout, key="approval")
    return pause_flow_run(wait_for_input=form, timeout=timeout, poll_interval=3, key="approval")
