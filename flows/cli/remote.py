"""Runs on a Prefect server: `rlhf submit`, `rlhf retry`, `rlhf cancel`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from flows.cli.output import echo
from rlhf_core.errors import ConfigError, RLHFError
from rlhf_core.jobs import PipelineConfig
from rlhf_core.store import Store

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

PIPELINE = "rlhf-pipeline/rlhf-all-settings"
CANCEL_SECONDS = 60
POLL_SECONDS = 2.0
SERVER_SECONDS = 300.0  # without the server before nobody waits any more: it may be started again


def submit(config: PipelineConfig, until: str = "publish") -> tuple[UUID, str]:
    """Start a pipeline on the server's workers; returns the flow run's id, and its page's URL.

    Args:
        until: last stage to run.

    Raises:
        ConfigError: no server runs, or the pipeline is not deployed there.
    """
    client, found = deployment(PIPELINE)
    from prefect.exceptions import PrefectHTTPStatusError

    try:
        run = client.create_flow_run_from_deployment(
            found.id,
            parameters={"config": config.model_dump(mode="json"), "until": until},
            name=config.name,
        )
    except PrefectHTTPStatusError as error:
        if error.response.status_code != 409:
            raise
        raise ConfigError(
            f"The server refuses the settings: {error.response.json().get('detail')}. Its "
            "deployments may be of another version than this command: start the system again, or "
            "`python -m flows.deploy`."
        ) from None
    return run.id, f"{ui()}/runs/flow-run/{run.id}"


def follow(run: UUID, lines: Callable[[str], None] | None) -> None:
    """Wait for the end of a flow run.

    Args:
        lines: gets the run's log; None: only its states.

    Raises:
        RLHFError: it did not complete, or the server is gone for long.
    """
    import httpx

    from tasks.launchers.child_logs import Logs

    client, logs, shown, answered = connect(), Logs(run), None, time.monotonic()
    while True:
        try:
            state = client.read_flow_run(run).state  # before the logs, so that none is left
            found = logs.new(client) if lines is not None else []
            answered = time.monotonic()
        except httpx.TransportError as error:
            if time.monotonic() - answered > SERVER_SECONDS:
                raise RLHFError(
                    f"The Prefect server has not answered for {SERVER_SECONDS:.0f} s "
                    f"({type(error).__name__}: {error}). The run may go on without it."
                ) from error
            time.sleep(POLL_SECONDS)
            continue
        for line in found:
            assert lines is not None
            lines(line)
        if state is not None and state.name != shown:
            shown = state.name
            echo(f"{datetime.now():%H:%M:%S}  {shown}", err=True)
        if state is not None and state.is_final():
            break
        time.sleep(POLL_SECONDS)
    if not state.is_completed():
        raise RLHFError(f"The run ended in the state {state.name}: {state.message or 'no reason'}")
    if state.message:
        echo(state.message)


def deployment(name: str) -> tuple[Any, Any]:
    """The server's client, and a deployment, as FLOW/DEPLOYMENT.

    Raises:
        ConfigError: no server runs, or it has no such deployment.
    """
    client = connect()
    from prefect.exceptions import ObjectNotFound

    try:
        return client, client.read_deployment_by_name(name)
    except ObjectNotFound:
        raise ConfigError(
            f"The Prefect server at {client.api_url} has no deployment {name}: start a system "
            "with `rlhf up`, or deploy it with `python -m flows.deploy`."
        ) from None


def retry(store: Store, reference: str) -> tuple[str, PipelineConfig | None]:
    """Schedule a failed run again, under its own name and id.

    Returns:
        URL of its page, and None; or, for a run that was not started on a worker, "" and its
        configuration for the caller to run.

    Raises:
        ConfigError: there is no such run, or it has not failed.
    """
    from prefect.states import AwaitingRetry

    record = _find_started(store, reference)
    flow_run = _flow_run(record)
    if flow_run is None or flow_run.deployment_id is None:
        if record["state"] == "completed":
            raise ConfigError(f"Run {record['id']} is completed; there is nothing to retry.")
        return "", PipelineConfig.model_validate(record["config"])
    state = flow_run.state
    if state is None or not state.is_final() or state.is_completed():
        name = state.name if state else "unknown"
        raise ConfigError(f"Run {record['id']} is {name}; only one that failed can be retried.")
    done = connect().set_flow_run_state(flow_run.id, AwaitingRetry(), force=True)
    if str(done.status.value) != "ACCEPT":
        raise ConfigError(f"The server refused the retry of run {record['id']}: {done.details}")
    return f"{ui()}/runs/flow-run/{flow_run.id}", None


def cancel(store: Store, reference: str) -> str:
    """Cancel a run and wait until it has ended; returns its last state.

    Raises:
        ConfigError: there is no such run, or it has ended.
    """
    from prefect.states import Cancelling

    record = _find_started(store, reference)
    flow_run = _flow_run(record)
    if flow_run is None:
        raise ConfigError(
            f"Run {record['id']} is not known to the Prefect server; stop it where it was started "
            "(Ctrl-C)."
        )
    if flow_run.state is None or flow_run.state.is_final():
        name = flow_run.state.name if flow_run.state else "unknown"
        raise ConfigError(f"Run {record['id']} has ended already ({name}).")
    client = connect()
    client.set_flow_run_state(flow_run.id, Cancelling(message="by rlhf cancel"), force=False)
    deadline = time.monotonic() + CANCEL_SECONDS
    while time.monotonic() < deadline:
        state = client.read_flow_run(flow_run.id).state
        if state is not None and state.is_final():
            return str(state.name)
        time.sleep(1)
    raise RLHFError(
        f"Run {record['id']} was cancelled but has not ended within {CANCEL_SECONDS} s: see {ui()}"
    )


def find_run(store: Store, reference: str) -> dict[str, Any]:
    """The record of a run by its name, its id, its first characters, its flow run's id, or `last`.

    Raises:
        ConfigError: no run, or several, match.
    """
    from flows.cli.lookup import elsewhere, read_runs

    runs = read_runs(store)
    if reference == "last" and runs:
        return runs[0]
    named = [run for run in runs if run.get("name") == reference]
    found = named or [
        run
        for run in runs
        if run["id"].startswith(reference) or str(run.get("flow_run", "")).startswith(reference)
    ]
    if len(found) == 1:
        return found[0]
    if not found:
        raise ConfigError(
            f"There is no run {reference!r} in {store.url}; `rlhf runs` lists them."
            + elsewhere(store)
        )
    what = "are called" if named else "start with"
    raise ConfigError(
        f"{len(found)} runs in {store.url} {what} {reference!r}, such as {found[0]['id']} and "
        f"{found[1]['id']}; `rlhf runs` lists them."
    )


def _find_started(store: Store, reference: str) -> dict[str, Any]:
    """As `find_run`; also a run that the server knows and that has written no record, because it
    has not begun: it waits, or its process could not be started."""
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.client.schemas.sorting import FlowRunSort

    try:
        return find_run(store, reference)
    except ConfigError as unknown:
        try:
            client = connect()
        except ConfigError:  # no server runs
            raise unknown from None
        runs = client.read_flow_runs(
            flow_run_filter=FlowRunFilter.model_validate({"tags": {"all_": ["pipeline"]}}),
            sort=FlowRunSort.EXPECTED_START_TIME_DESC,
            limit=200,
        )
        found = [str(run.id) for run in runs if str(run.id).startswith(reference)]
        if len(found) != 1:
            raise
        return {"id": found[0], "flow_run": found[0]}


def ui() -> str:
    """URL of the server's pages."""
    return str(connect().api_url).rstrip("/").removesuffix("/api")


def _flow_run(record: dict[str, Any]) -> FlowRun | None:
    from prefect.exceptions import ObjectNotFound

    try:
        found: FlowRun = connect().read_flow_run(UUID(record["flow_run"]))
        return found
    except (ObjectNotFound, KeyError, ValueError, TypeError, ConfigError):
        return None


def connect() -> Any:
    from flows.server import choose_server

    server = choose_server()
    if server.url is None:
        raise ConfigError(
            f"No Prefect server is known here: {server.problem}. Start a system with `rlhf up`, or "
            "set PREFECT_API_URL to the server's, such as http://127.0.0.1:4200/api."
        )
    os.environ.setdefault("PREFECT_API_URL", server.url)
    from prefect.client.orchestration import get_client

    return get_client(sync_client=True)
