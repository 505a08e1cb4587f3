"""Pipelines that wait for one child run, and whether that child still lives.

A pipeline that waits has a tag with the job's key. It writes only its own tags, so that no two
processes write the same.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect.states import Crashed

from tasks.flow_runs import read_all

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun, State

DECLARED_DEAD = "no heartbeat for"  # start of the message of a run that was declared dead
SILENCE_SECONDS = 150
"""A run without heartbeats for this long is declared dead. That is five heartbeats with
PREFECT_FLOWS_HEARTBEAT_FREQUENCY=30, so that a busy run, or a server that was unavailable for a
minute, does not matter. After a longer outage a live run corrects its state (tasks/watch.py)."""
SIGN_SECONDS = 60.0  # in which a silent child that lives sends a heartbeat: two of them
WAITS = "waits:"
AUTHOR = "author:"


def mark_waiting(
    client: SyncPrefectClient, pipeline: UUID, key: str | None, author: str = ""
) -> None:
    """Tag a pipeline with its author, and as waiting for the job with this key; None: for none."""
    tags = [t for t in client.read_flow_run(pipeline).tags if not t.startswith((WAITS, AUTHOR))]
    tags += [f"{AUTHOR}{author}"] if author else []
    client.update_flow_run(pipeline, tags=[*tags, *([_name(key)] if key else [])])


def waiters(client: SyncPrefectClient, key: str) -> list[FlowRun]:
    """The running pipelines that wait for the job with this key."""
    wanted = {"tags": {"all_": [_name(key)]}, "state": {"type": {"any_": ["RUNNING"]}}}
    return read_all(client, wanted)


def key_of(tags: list[str]) -> str | None:
    """The key of a child's job, by its tags."""
    return tagged(tags, "job")


def parent_of(child: FlowRun) -> str:
    """Id of the pipeline that has started a child run, by its tags; "" if there is none."""
    return tagged(child.tags, "parent") or ""


def tagged(tags: list[str], name: str) -> str | None:
    """The value of the tag NAME:VALUE; None without one."""
    start = f"{name}:"
    return next((tag.removeprefix(start) for tag in tags if tag.startswith(start)), None)


def _name(key: str) -> str:
    return f"{WAITS}{key[:16]}"


# --------------------------------------------------------------------------- signs of life


def silence(client: SyncPrefectClient, run: FlowRun) -> float:
    """Seconds since a running flow run's last sign of life; 0 for one that never sent a heartbeat,
    because heartbeats may be off."""
    last = _last_heartbeat(client, run.id)
    if last is None or run.state is None or not run.state.is_running():
        return 0.0
    return (datetime.now(UTC) - max(last, run.state.timestamp)).total_seconds()


def lives(client: SyncPrefectClient, run: FlowRun) -> bool:
    """Whether a child may be joined. One that has been silent for long gets a minute to show that
    it lives, since a server that was away has missed heartbeats."""
    if silence(client, run) <= SILENCE_SECONDS:
        return True
    deadline = time.monotonic() + SIGN_SECONDS
    while time.monotonic() < deadline:
        now = client.read_flow_run(run.id)
        if now.state is None or not now.state.is_running():
            return False
        if silence(client, now) <= SILENCE_SECONDS:
            return True
        time.sleep(2)
    return False


def declare_dead(client: SyncPrefectClient, run: FlowRun) -> None:
    """Set a run to crashed, in the words of the automation that finds lost runs."""
    state: State[Any] = Crashed(
        message=f"{DECLARED_DEAD} {SILENCE_SECONDS} s: its process or machine was lost"
    )
    client.set_flow_run_state(run.id, state, force=True)


def _last_heartbeat(client: SyncPrefectClient, run: UUID) -> datetime | None:
    body = {
        "filter": {
            "event": {"name": ["prefect.flow-run.heartbeat"]},
            "resource": {"id": [f"prefect.flow-run.{run}"]},
            "occurred": {"since": (datetime.now(UTC) - timedelta(days=14)).isoformat()},
            "order": "DESC",
        },
        "limit": 1,
    }
    found = client.request("POST", "/events/filter", json=body).json()["events"]
    return datetime.fromisoformat(found[0]["occurred"]) if found else None
