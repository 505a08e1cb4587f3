"""Flow runs of the Prefect server, and the states that end them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter
from prefect.client.schemas.sorting import FlowRunSort
from prefect.states import Failed

from rlhf_core.errors import RLHFError
from rlhf_core.system.secrets import redact
from tasks.launchers.failures import state_name

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun, State

PAGE = 200  # runs that the server gives at once
IN_PROGRESS = ("RUNNING", "PENDING", "CANCELLING")


def read_all(
    client: SyncPrefectClient, wanted: Mapping[str, Any], pool: str | None = None
) -> list[FlowRun]:
    """All flow runs that a filter selects, the latest due first.

    Args:
        wanted: as JSON of a `FlowRunFilter`.
        pool: only those of this work pool.
    """
    among = None if pool is None else WorkPoolFilter.model_validate({"name": {"any_": [pool]}})
    found: dict[Any, FlowRun] = {}  # a run that comes up meanwhile moves others to the next page
    for offset in itertools.count(0, PAGE):
        page = client.read_flow_runs(
            flow_run_filter=FlowRunFilter.model_validate(wanted),
            work_pool_filter=among,
            sort=FlowRunSort.EXPECTED_START_TIME_DESC,
            limit=PAGE,
            offset=offset,
        )
        found |= {run.id: run for run in page}
        if len(page) < PAGE:
            break
    return list(found.values())


def of_states(
    client: SyncPrefectClient, states: Sequence[str], pool: str | None = None
) -> list[FlowRun]:
    """All flow runs in some states."""
    return read_all(client, {"state": {"type": {"any_": list(states)}}}, pool)


def failed(error: RLHFError) -> State[Any]:
    """The state of a flow run that ended with this error: its name says the category, and its
    message hides secrets."""
    state: State[Any] = Failed(
        name=state_name(error.category), message=redact(str(error)), data=error
    )
    return state
