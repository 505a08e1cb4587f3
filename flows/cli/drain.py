"""`rlhf down` while runs are in progress: they stop at a checkpoint first."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import ConfigError

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

DRAIN_SECONDS = 90.0  # a stage has up to 27 seconds for its checkpoint (stop_timeout)
STOPPED = "Stopped"


def before_down(wait: bool) -> None:
    """Tell which runs are in progress, and stop them.

    Args:
        wait: until they have ended; otherwise they die with the system.
    """
    import httpx

    from flows.cli import remote
    from flows.cli.output import echo

    try:
        client = remote.connect()
        runs = pipelines_in_progress(client)
        for run in runs:
            where = "" if on_a_worker(run) else ", started at a terminal: it loses its servers"
            echo(f"in progress: {run.name} ({str(run.id)[:8]}{where})", err=True)
        if runs and wait:
            echo(
                f"their stages stop at a checkpoint (at most {DRAIN_SECONDS:.0f} s; `rlhf down "
                "--now` does not wait)",
                err=True,
            )
        if wait and (left := drain(client)):
            names = ", ".join(run.name for run in left)
            echo(f"not ended in time: {names}", err=True)
        elif runs:
            echo("after the next `rlhf up`, `rlhf retry ID` continues a run", err=True)
    except (httpx.HTTPError, ConfigError):
        echo("the Prefect server does not answer: runs in progress are not drained", err=True)


def pipelines_in_progress(client: Any) -> list[FlowRun]:
    """Running flow runs that are no stage of another one, oldest first."""
    from tasks.flow_runs import IN_PROGRESS, of_states
    from tasks.waiters import key_of

    return [run for run in reversed(of_states(client, IN_PROGRESS)) if key_of(run.tags) is None]


def on_a_worker(run: FlowRun) -> bool:
    """False for a run that was started at a terminal (`rlhf run`)."""
    return run.work_pool_name is not None


def drain(client: Any) -> list[FlowRun]:
    """Stop every run of the workers, and wait until their processes have ended.

    Returns:
        The runs that have not ended in time.
    """
    from prefect.exceptions import ObjectNotFound
    from prefect.states import Cancelling, Crashed

    from tasks.flow_runs import IN_PROGRESS, of_states
    from tasks.waiters import key_of

    stopped: dict[Any, FlowRun] = {}
    deadline = time.monotonic() + DRAIN_SECONDS
    while left := [run for run in of_states(client, IN_PROGRESS) if on_a_worker(run)]:
        if time.monotonic() > deadline:
            return left
        for run in left:
            if run.id not in stopped and key_of(run.tags) is None:
                stopped[run.id] = run
                state: Any = Cancelling(message="by rlhf down")
                with suppress(ObjectNotFound):  # somebody has deleted it
                    client.set_flow_run_state(run.id, state, force=False)
        time.sleep(1)
    for run in stopped.values():
        with suppress(ObjectNotFound):
            state = client.read_flow_run(run.id).state
            if state is not None and state.is_cancelled():
                text = f"by `rlhf down`, at a checkpoint; `rlhf retry {str(run.id)[:8]}` goes on"
                client.set_flow_run_state(run.id, Crashed(name=STOPPED, message=text), force=True)
    return []
