"""The `work_pool` launcher: it runs a stage as a child flow run, on a worker with GPUs.

Parent and worker share only the store and the Prefect server. A child has a tag with the job's key:
a parent that was killed and is retried adopts the child that still runs, and two pipelines that
need the same result wait for the same child.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

import httpx
from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Cancelling, Scheduled

from rlhf_core.errors import ConfigError, JobFailed
from rlhf_core.jobs import WorkPoolLauncher
from rlhf_core.runtime.launches import launch_id
from tasks.events import parse_progress
from tasks.flow_runs import read_all
from tasks.launchers.base import Launch, LineSink, Outcome, ProgressSink
from tasks.launchers.child_logs import Logs
from tasks.launchers.failures import category_of
from tasks.launchers.outcome import results
from tasks.launchers.queue import QUEUES, is_first, queue_name, turn, why_it_waits
from tasks.launchers.waits import Waits
from tasks.waiters import declare_dead, lives, mark_waiting, parent_of, waiters
from tasks.watch import declared_dead

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun, State

POLL_SECONDS = 2.0
FIRST_POLLS = 0.5  # of a stage's first minute: a short stage would be as long as its last poll
BUSY = 10  # times as long as the answers took, a pipeline leaves the server alone
LONGEST_PAUSE = 20.0
SERVER_TIMEOUT = 900.0  # seconds without the server before a stage gives up
RECORDING_SECONDS = 20.0  # within which the server has recorded a task
MAX_CHILDREN = 3  # that others may cancel, one after another, before giving up
MOVED_UP = "moved up in the queue"
REVIVAL_TIME = timedelta(seconds=20)

Result = TypeVar("Result")


class WorkPool:
    """Runs a launch on a worker of the deployment's work pool."""

    def __init__(self, settings: WorkPoolLauncher) -> None:
        self.settings = settings

    @cached_property
    def _client(self) -> SyncPrefectClient:
        return get_client(sync_client=True)

    def prepare(self) -> None:
        """See `Launcher.prepare`. Nothing to do: imports happen on the workers."""

    def run(self, launch: Launch, on_output: LineSink, on_progress: ProgressSink) -> list[Outcome]:
        """See `Launcher.run`. If the caller is interrupted, the child is cancelled."""
        key = launch_id(launch.jobs.values())
        cancelled = 0
        while cancelled < MAX_CHILDREN:
            with self._waiting(key, launch.author):
                child, new = self._find_or_start(key, launch, on_output)
                how = "" if new else ", started earlier"
                on_output(f"flow run {child.name} ({child.id}){how}")
                try:
                    state = self._wait_for_end(child, launch, on_output, on_progress)
                except BaseException as stop:  # cancelled, or timed out
                    self._leave(child, key, stop, on_output)
                    raise
            if (outcomes := results(launch)) is not None:
                return outcomes
            if not state.is_cancelled():
                raise _failure(launch.name, child, state)
            if state.message == MOVED_UP:
                on_output(MOVED_UP)
                continue
            cancelled += 1
            on_output("somebody else cancelled it; starting anew (to stop, cancel this pipeline)")
        raise JobFailed(
            f"{launch.name} failed: its flow run was cancelled {MAX_CHILDREN} times, not by this "
            f"pipeline\n{_where(child)}",
            "cancelled",
        )

    @contextlib.contextmanager
    def _waiting(self, key: str, author: str) -> Iterator[None]:
        """While the block runs, this pipeline is known to wait for the job with this key."""
        if (own := _own_id()) is None:
            yield
            return
        self._retry(lambda: mark_waiting(self._client, own, key, author))
        try:
            yield
        finally:
            with contextlib.suppress(httpx.HTTPError):  # its state says that it waits no more
                mark_waiting(self._client, own, None, author)

    # ------------------------------------------------------------------ start

    def _find_or_start(self, key: str, launch: Launch, report: LineSink) -> tuple[FlowRun, bool]:
        """The running child of this job, one that has just made the result, or a new one.

        The server creates one child per idempotency key, so that parents that ask at the same time
        get the same child.

        Returns:
            The child, and whether it is new and this run is its parent.
        """
        earlier = self._retry(lambda: self._children(key))
        parent = runtime.flow_run.id or ""
        for child in earlier:
            if child.state is None or child.state.is_final() or child.state.is_cancelling():
                continue
            if self._retry(lambda child=child: lives(self._client, child)):  # type: ignore[misc]
                return child, False
            report(f"flow run {child.name} ({child.id}) sends no heartbeats: it is taken for dead")
            self._retry(lambda child=child: declare_dead(self._client, child))  # type: ignore[misc]
        if earlier and results(launch) is not None:  # one has ended since the store was asked
            return earlier[0], False
        try:
            deployment = self._retry(
                lambda: self._client.read_deployment_by_name(self.settings.deployment)
            )
        except ObjectNotFound:
            raise ConfigError(
                f"launcher.deployment {self.settings.deployment!r} is not known to the Prefect "
                "server: deploy it (`make up`, or `prefect deploy --all --prefect-file "
                "deployments/prefect.yaml`), or set launcher.type to local."
            ) from None
        parameters = {
            "stage": launch.name,
            "jobs": [job.model_dump(mode="json") for job in launch.jobs.values()],
            "store": launch.store,
            "pipeline": parent or None,
        }
        due, queue = self._retry(lambda: self._turn(launch))
        child = self._retry(
            lambda: self._create(
                deployment.id,
                state=Scheduled(scheduled_time=due),
                work_queue_name=queue,
                parameters=parameters,
                name=f"{launch.name} of {runtime.flow_run.name or 'a pipeline'}",
                tags=[f"job:{key}", f"stage:{launch.name}", f"parent:{parent}"],
                key=f"{key}:{len(earlier)}",
            )
        )
        return child, parent_of(child) == parent  # another pipeline may have been faster

    def _turn(self, launch: Launch) -> tuple[datetime | None, str | None]:
        """When a child is due, and in which queue; None for a caller that is no flow run."""
        if (own := _own_id()) is None:
            return None, None
        pipeline = self._client.read_flow_run(own)
        first = is_first(self._client, pipeline, launch.author)
        return turn(pipeline), queue_name(launch.priority, first)

    def _create(self, deployment: UUID, key: str | None = None, **what: Any) -> FlowRun:
        """Create a child of this task, or return that of another parent with the same key. The
        server counts keys per flow, so that one alone could name a child of another deployment.

        The server records a task up to a few seconds after its start, and refuses a child of a
        task that it has not recorded. So the request is repeated for a while.
        """
        task = _task_run_id()
        began = time.monotonic()
        while True:
            try:
                return self._client.create_flow_run_from_deployment(
                    deployment,
                    parent_task_run_id=task,
                    idempotency_key=key and f"{key}:{deployment}",
                    **what,
                )
            except httpx.HTTPStatusError as error:
                unknown = error.response.status_code == 409 and "integrity" in error.response.text
                if task is None or not unknown:
                    raise
                if time.monotonic() - began > RECORDING_SECONDS:
                    task = None  # the tag `parent:` still names the parent
            time.sleep(0.2)

    def _children(self, key: str) -> list[FlowRun]:
        return read_all(self._client, {"tags": {"all_": [f"job:{key}"]}})

    # ------------------------------------------------------------------ follow

    def _wait_for_end(
        self, child: FlowRun, launch: Launch, on_output: LineSink, on_progress: ProgressSink
    ) -> State[Any]:
        """Wait for the end; pass on lines and progress meanwhile."""
        logs = Logs(child.id)
        timeout = self.settings.queue_timeout
        waits = Waits(
            timeout,
            f"no slot of work pool {child.work_pool_name} became free within "
            f"launcher.queue_timeout, {timeout} s: start more workers, or raise it.",
            on_output, on_progress,
        )  # fmt: skip
        began = time.monotonic()
        while True:
            asked = time.monotonic()
            run = self._retry(lambda: self._client.read_flow_run(child.id))
            for message in self._retry(lambda: logs.new(self._client)):
                progress = parse_progress(message)
                if progress is None:
                    on_output(message)
                else:
                    on_progress(progress)
            state = run.state
            assert state is not None
            if not (state.is_scheduled() or state.is_pending()):
                waits.over()
                if state.is_final() and not self._may_revive(state):
                    return state
            elif waits.report(partial(self._why, run)) and state.is_scheduled():
                self._retry(lambda run=run: self._move_up(run, launch))  # type: ignore[misc]
            now = time.monotonic()
            time.sleep(pause(now - began, now - asked))

    def _why(self, child: FlowRun) -> str:
        """What a child waits for; "" while the server is unavailable."""
        try:
            return why_it_waits(self._client, child)
        except httpx.HTTPError:
            return ""

    def _move_up(self, child: FlowRun, launch: Launch) -> None:
        """Give up a scheduled child for one in a better queue: its pipeline has become the oldest
        of its author, or this one has a higher priority than the one that started it."""
        better = self._turn(launch)[1]
        there = QUEUES.get(child.work_queue_name or "")
        if better is not None and there is not None and QUEUES[better] < there:
            self._client.set_flow_run_state(child.id, Cancelled(message=MOVED_UP), force=False)

    @staticmethod
    def _may_revive(state: State[Any]) -> bool:
        """Whether a run that was declared dead for missing heartbeats may still report itself."""
        return declared_dead(state) and datetime.now(UTC) - state.timestamp < REVIVAL_TIME

    def _leave(self, child: FlowRun, key: str, reason: BaseException, report: LineSink) -> None:
        """Cancel the child, which must not run on alone, unless other pipelines wait for it."""
        message = f"the pipeline was stopped ({type(reason).__name__})"
        try:
            others = [w for w in waiters(self._client, key) if w.id != _own_id()]
            if others:
                report(f"leaving the flow run of this stage to {others[0].name}, which needs it")
                return
            report("cancelling the flow run of this stage")
            self._client.set_flow_run_state(child.id, Cancelling(message=message), force=False)
        except Exception as error:  # the child watches its parent, and ends itself
            print(f"WARNING: flow run {child.id} could not be cancelled: {error}", flush=True)

    def _retry(self, call: Callable[[], Result]) -> Result:
        """The result of a call to the server, which is repeated while the server is unavailable."""
        began = time.monotonic()
        while True:
            try:
                return call()
            except ObjectNotFound:
                raise
            except httpx.HTTPStatusError as error:
                if error.response.status_code < 500:
                    raise
                problem: Exception = error
            except httpx.HTTPError as error:
                problem = error
            if time.monotonic() - began > SERVER_TIMEOUT:
                raise JobFailed(
                    f"the Prefect server did not answer for {SERVER_TIMEOUT:.0f} s: {problem}",
                    category="lost",
                ) from problem
            time.sleep(POLL_SECONDS)


# --------------------------------------------------------------------------- helpers


def pause(waited: float, answered: float) -> float:
    """Seconds until a pipeline asks again for the state of its stage.

    Many pipelines ask one server. The slower it answers, the less often each of them asks, so that
    they do not keep it from the requests that move their runs on.

    Args:
        waited: seconds since the stage was handed over.
        answered: seconds that the server's last answers took.
    """
    usual = FIRST_POLLS if waited < 60 else POLL_SECONDS
    return max(usual, min(BUSY * answered, LONGEST_PAUSE))


def _own_id() -> UUID | None:
    text = runtime.flow_run.id
    return UUID(str(text)) if text else None


def _task_run_id() -> UUID | None:
    text = runtime.task_run.id
    return UUID(str(text)) if text else None


def _where(child: FlowRun) -> str:
    return f"Flow run: {child.name} ({child.id})"


def _failure(stage: str, child: FlowRun, state: State[Any]) -> JobFailed:
    text = re.sub(rf"^{re.escape(stage)} failed: ", "", state.message or state.name or "")
    where = _where(child)
    if state.is_crashed():
        return JobFailed(f"{stage} failed: the worker or its process was lost\n{where}", "lost")
    return JobFailed(f"{stage} failed: {text}\n{where}", category_of(state.name))
