"""Manual approval before a model is published (`publish.approval: manual`)."""

from __future__ import annotations

import os
from typing import Any, Literal

from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.exceptions import Pause
from prefect.flow_runs import pause_flow_run, suspend_flow_run
from prefect.input import RunInput

from flows import server
from rlhf_core.errors import PreflightError
from rlhf_core.jobs import PipelineConfig

WAITING = "WaitingForApproval"
"""Name of the run's state while it waits."""


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
        try:
            return suspend_flow_run(wait_for_input=form, timeout=timeout, key="approval")
        except Pause as asked:
            _name(asked.state)
            raise
    return pause_flow_run(wait_for_input=form, timeout=timeout, poll_interval=3, key="approval")


def _name(state: State[Any] | None) -> None:
    """Rename the paused state on the server: to what the run waits for."""
    if state is not None:
        named = State[Any](
            type=state.type,
            name=WAITING,
            message="Resume, on the run's page, asks for the decision.",
            state_details=state.state_details,
        )
        get_client(sync_client=True).set_flow_run_state(runtime.flow_run.id, named, force=True)
