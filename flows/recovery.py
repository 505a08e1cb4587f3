"""Ends the flow runs that a machine's workers have started and whose process is gone.

    python -m flows.recovery POOL=WORKER ...

`rlhf up` does so before it starts workers: whatever an earlier system left in progress has no
process, unless one survived its worker. Prefect keeps such a run in its state for good, and the run
keeps its slot of the pool. The records of the store and the checkpoints are as they were, so that a
pipeline that ends here can be retried and goes on.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import psutil
from prefect.client.orchestration import get_client
from prefect.states import Cancelled, Crashed

from tasks.flow_runs import IN_PROGRESS, of_states, read_all
from tasks.waiters import key_of, parent_of, waiters

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

NO_PROCESS = "its process is gone, it ended with the system or the worker that had started it"


def recover(pools: dict[str, str]) -> list[FlowRun]:
    """End runs without a process, and children that no pipeline waits for any more.

    Args:
        pools: work pool -> name of this machine's worker; none of these workers runs.

    Returns:
        The runs that were ended.
    """
    client: Any = get_client(sync_client=True)
    alive = _runs_with_a_process()
    ended = []
    for pool, worker in pools.items():
        alone = not any(
            w.status == "ONLINE" and w.name != worker
            for w in client.read_workers_for_work_pool(pool)
        )
        for run in of_states(client, IN_PROGRESS, pool):
            started_by = run.labels.get("prefect.worker.name")
            ours = started_by == worker or (started_by is None and alone)
            if ours and str(run.id) not in alive:
                _end(client, run)
                ended.append(run)
    for pool in pools:
        for run in of_states(client, ["SCHEDULED"], pool):
            if _abandoned(client, run):
                message = "no pipeline waits for it any more"
                client.set_flow_run_state(run.id, Cancelled(message=message), force=True)
                ended.append(run)
    return ended


def _end(client: Any, run: FlowRun) -> None:
    cancelling = run.state is not None and run.state.is_cancelling()
    retry = "" if key_of(run.tags) else f"; `rlhf retry {str(run.id)[:8]}` goes on from there"
    state: Any = (
        Cancelled(message=NO_PROCESS) if cancelling else Crashed(message=NO_PROCESS + retry)
    )
    client.set_flow_run_state(run.id, state, force=True)


def _abandoned(client: Any, run: FlowRun) -> bool:
    """Whether a child's pipeline has ended, and no other one waits for the same job."""
    key = key_of(run.tags)
    parent = parent_of(run)
    if key is None or not parent or waiters(client, key):
        return False
    found = read_all(client, {"id": {"any_": [parent]}})
    return all(pipeline.state is None or pipeline.state.is_final() for pipeline in found)


def _runs_with_a_process() -> set[str]:
    """Ids of the flow runs that have a process on this machine."""
    found = set()
    for process in psutil.process_iter():
        try:
            found.add(process.environ().get("PREFECT__FLOW_RUN_ID", ""))
        except psutil.Error:  # it has ended, or is somebody else's
            continue
    return found


if __name__ == "__main__":
    for run in recover(dict(part.split("=") for part in sys.argv[1:])):
        print(f"ended {run.name} ({run.id}), which was {run.state_name}")
