"""The order in which stages get the slots of a work pool, and how long one still waits.

Prefect's worker takes scheduled runs by the priority of their work queue, and within a queue by
their scheduled time. So a stage is scheduled at the time at which its pipeline was started, long
ago: the oldest pipeline goes first, and pipelines end one after another instead of all late. The
queue is chosen by the run's `priority`; a further pipeline of an author who has an older one in
progress is behind the first ones of others (fair share), and gets what they leave free.
"""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.sorting import FlowRunSort

from rlhf_core.jobs import Priority
from tasks.flow_runs import IN_PROGRESS, of_states, read_all
from tasks.launchers.waits import ordinal
from tasks.waiters import AUTHOR, tagged

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

QUEUES = {"high": 1, "default": 2, "further": 3, "low": 4}
"""Work queue of the gpu pool -> its priority. `further` has the further pipelines of an author."""
PAST_RUNS = 20  # of a stage, whose median is what the next one takes


def queue_name(priority: Priority, first: bool) -> str:
    """The queue of a stage.

    Args:
        first: whether its pipeline is the oldest of its author.
    """
    if priority != "normal":
        return str(priority)
    return "default" if first else "further"


def is_first(client: SyncPrefectClient, pipeline: FlowRun, author: str) -> bool:
    """Whether no older pipeline of this author is running."""
    wanted = {"tags": {"all_": [f"{AUTHOR}{author}"]}, "state": {"type": {"any_": ["RUNNING"]}}}
    running = read_all(client, wanted)
    own = (turn(pipeline), str(pipeline.id))
    return not any((turn(r), str(r.id)) < own for r in running)


def turn(pipeline: FlowRun) -> datetime:
    """When a pipeline was due; a retry does not change it."""
    return pipeline.expected_start_time or pipeline.created or datetime.now(UTC)


# --------------------------------------------------------------------------- position and time


@dataclass(frozen=True)
class Waiting:
    """What a stage waits for.

    Attributes:
        place: 1 for the next one.
        seconds: until it starts, as estimated; None where nothing is known of past stages.
    """

    place: int
    of: int
    seconds: float | None

    def __str__(self) -> str:
        when = ""
        if self.seconds is not None:
            hours, minutes = divmod(round(self.seconds / 60), 60)
            about = f"{hours} h {minutes} min" if hours else f"{minutes} min"
            when = f", about {about}" if hours or minutes else ", less than a minute"
        return f"{ordinal(self.place)} of {self.of}{when}"


def wait_seconds(running: Iterable[float], ahead: Iterable[float], slots: int) -> float:
    """Seconds until a slot is free for the next stage.

    Args:
        running: seconds that each running stage still takes.
        ahead: seconds that each waiting stage takes that comes before, in their order.
        slots: stages that run at once.
    """
    free = sorted(running)
    free += [0.0] * (slots - len(free))
    free = free[-slots:] if len(free) > slots else free
    heapq.heapify(free)
    for each in ahead:
        heapq.heappushpop(free, free[0] + each)
    return free[0]


def place_of(client: SyncPrefectClient, run: FlowRun) -> Waiting:
    """The place of a scheduled run in its pool, and the time until its start."""
    pool = run.work_pool_name or ""
    priorities = {q.name: q.priority for q in client.read_work_queues(work_pool_name=pool)}

    def order(r: FlowRun) -> tuple[int, datetime]:
        due = r.next_scheduled_start_time or turn(r)
        return priorities.get(r.work_queue_name or "", 0), due

    now = datetime.now(UTC) + timedelta(seconds=10)
    scheduled = of_states(client, ["SCHEDULED"], pool)
    queued = sorted((r for r in scheduled if order(r)[1] <= now), key=order)
    running = of_states(client, IN_PROGRESS, pool)
    ids = [r.id for r in queued]
    before = ids.index(run.id) if run.id in ids else 0
    ahead = queued[:before]
    past = _past(client, {stage_of(r) for r in (*running, *ahead)})
    known = [past[stage_of(r)] for r in (*running, *ahead) if stage_of(r) in past]
    if (running or ahead) and not known:
        return Waiting(before + 1, max(len(queued), 1), None)
    usual = statistics.median(known) if known else 0.0
    left = [max(0.0, past.get(stage_of(r), usual) - _elapsed(r)) for r in running]
    takes = [past.get(stage_of(r), usual) for r in ahead]
    slots = client.read_work_pool(pool).concurrency_limit or max(len(running), 1)
    return Waiting(before + 1, max(len(queued), 1), wait_seconds(left, takes, slots))


def stage_of(run: FlowRun) -> str:
    """The stage of a child run, by its tags."""
    return tagged(run.tags, "stage") or ""


def _elapsed(run: FlowRun) -> float:
    return (datetime.now(UTC) - run.start_time).total_seconds() if run.start_time else 0.0


def _past(client: SyncPrefectClient, stages: Iterable[str]) -> Mapping[str, float]:
    """Stage -> median seconds of its last runs; without those that have none."""
    found = {}
    for stage in stages:
        wanted = {"tags": {"all_": [f"stage:{stage}"]}, "state": {"type": {"any_": ["COMPLETED"]}}}
        runs = client.read_flow_runs(
            flow_run_filter=FlowRunFilter.model_validate(wanted),
            sort=FlowRunSort.END_TIME_DESC,
            limit=PAST_RUNS,
        )
        if runs:
            found[stage] = statistics.median(r.total_run_time.total_seconds() for r in runs)
    return found


# --------------------------------------------------------------------------- reports


def why_it_waits(client: Any, run: FlowRun) -> str:
    """What a scheduled flow run waits for, in one sentence."""
    pool = run.work_pool_name or ""
    workers = [w for w in client.read_workers_for_work_pool(pool) if w.status == "ONLINE"]
    if not workers:
        return f"no worker of pool {pool} is online; start one: prefect worker start --pool {pool}"
    if run.state is not None and run.state.is_pending():
        return f"a worker of pool {pool} is starting it"
    busy: dict[UUID, str] = {r.id: r.name for r in of_states(client, ["RUNNING", "PENDING"], pool)}
    names = ", ".join(list(busy.values())[:3]) + (f" and {len(busy) - 3} more" * (len(busy) > 3))
    return f"{place_of(client, run)}" + (f"; running: {names}" if busy else "")
