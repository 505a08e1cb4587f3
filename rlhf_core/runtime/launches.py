"""Launches on other machines: what orchestrator and nodes tell each other through the store.

    launches/<id>/jobs.json                          the jobs, written by the orchestrator
    launches/<id>/attempts/<attempt>/node-<rank>.json   how a node fares, written by its agent

A launch's id follows from its jobs' stage keys: a pipeline that is started again finds the launch
of the one that was killed. An attempt is one start of all nodes; its name is the scheduler's, such
as a job's id with the number of its restarts. Does not import torch.

Exit codes of an agent, for schedulers that decide by them (torchrun itself always exits with 1):

    0    DONE       the results are in the store
    64   ENDED      another attempt would fail again, or needs a decision of the orchestrator, as
                    after running out of memory
    69   LOST       another attempt can help: a lost process or node, a hang, an unreachable store
    75   STOPPED    got SIGTERM; the next attempt goes on from the checkpoint
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from rlhf_core.errors import RETRYABLE, ArtifactNotFound
from rlhf_core.jobs import Job
from rlhf_core.store import Store

DONE, ENDED, LOST, STOPPED = 0, 64, 69, 75

REASON, SIGNAL, CONSEQUENCE = 0, 1, 2
"""How much a failure explains: a reason of its own; a signal to stop, which may follow from another
node's failure; or the loss of another rank."""

_JOBS: TypeAdapter[list[Job]] = TypeAdapter(list[Job])


class NodeReport(BaseModel):
    """How one node of an attempt fares.

    Attributes:
        node: its rank among the nodes.
        host: its name.
        state: "running" until its agent ends.
        port: on which node 0 waits for the agents of the others.
        category, text: of its failure.
        time: of the failure, seconds since 1970.
        weight: REASON, SIGNAL or CONSEQUENCE.
    """

    model_config = ConfigDict(frozen=True)

    node: int
    host: str
    state: Literal["running", "done", "failed"] = "running"
    port: int = 0
    category: str = ""
    text: str = ""
    time: float = 0.0
    weight: int = REASON


def launch_id(jobs: Iterable[Job]) -> str:
    """Id of jobs that run in one process group: 32 hexadecimal digits."""
    return hashlib.sha256(" ".join(job.key() for job in jobs).encode()).hexdigest()[:32]


def exit_code(category: str | None) -> int:
    """An agent's exit code for the category of its failure; None: it has not failed."""
    if category is None:
        return DONE
    if category == "preempted":
        return STOPPED
    # The orchestrator halves the micro-batch before the next attempt.
    return LOST if category in RETRYABLE - {"oom"} else ENDED


def write_jobs(store: Store, name: str, jobs: Sequence[Job]) -> str:
    """Leave the jobs of a launch for its nodes; returns the launch's id.

    Args:
        name: of the stage.
    """
    found = launch_id(jobs)
    value = {"name": name, "jobs": [job.model_dump(mode="json") for job in jobs]}
    store.write_record(f"launches/{found}/jobs.json", value)
    return found


def read_jobs(store: Store, launch: str) -> tuple[str, list[Job]]:
    """Name and jobs of a launch.

    Raises:
        ArtifactNotFound: the store has no launch with this id, or one of another version.
    """
    path = f"launches/{launch}/jobs.json"
    record = store.read_record(path)
    if record is None:
        raise ArtifactNotFound(f"{store.url} has no {path}: is it the store of the pipeline?")
    try:
        return str(record["name"]), _JOBS.validate_python(record["jobs"])
    except (ValidationError, KeyError) as error:
        raise ArtifactNotFound(
            f"{path} in {store.url} cannot be read here: do pipeline and nodes run the same "
            f"version? {error}"
        ) from error


def write_report(store: Store, launch: str, attempt: str, report: NodeReport) -> None:
    """Tell the orchestrator how a node fares."""
    store.write_record(_path(launch, attempt, report.node), report.model_dump())


def read_reports(store: Store, launch: str, attempt: str, nodes: int) -> dict[int, NodeReport]:
    """Node -> its report, of the nodes that have written one."""
    found: dict[int, NodeReport] = {}
    for node in range(nodes):
        record: dict[str, Any] | None = store.read_record(_path(launch, attempt, node))
        if record is not None:
            found[node] = NodeReport.model_validate(record)
    return found


def forget(store: Store, launch: str) -> None:
    """Remove what the store holds of a launch that has ended."""
    for path in store.list_records(f"launches/{launch}/"):
        store.delete_record(path)


def _path(launch: str, attempt: str, node: int) -> str:
    return f"launches/{launch}/attempts/{attempt}/node-{node}.json"
