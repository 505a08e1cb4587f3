"""The `work_pool` launcher: it runs a stage as a child flow run, on a worker with GPUs.

Parent and worker share only the store and the Prefect server. A child has a tag with the job's key:
a parent that was killed and is retried adopts the child that still runs, and two pipelines that
need the same result wait for the same child.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

import httpx
from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling

from rlhf_core.errors import ConfigError, JobFailed
from rlhf_core.jobs import Job, WorkPoolLauncher
from rlhf_core.store import open_store
from tasks.events import parse_progress
from tasks.launchers.base import Launch, LineSink, Outcome, ProgressSink
from tasks.launchers.child_logs import Logs
from tasks.launchers.failures import category_of
from tasks.waiters import declare_dead, lives, mark_waiting, waiters
from tasks.watch import declared_dead

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun, State

POLL_SECONDS = 2.0
FIRST_POLLS = 0.5  # of a stage's first minute: a short stage would be as long as its last poll
WAIT_REPORT_SECONDS = 60.0  # between two messages about what a child waits for
SERVER_TIMEOUT = 900.0  # seconds without the server before a stage gives up
RECORDING_SECONDS = 20.0  # within which the server has recorded a task
MAX_CHILDREN = 3  # that others may cancel, one after another, before giving up
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
        key = shared_key(launch.jobs.values())
        for _ in range(MAX_CHILDREN):
            with self._waiting(key):
                child, new = self._find_or_start(key, launch, on_output)
                how = "" if new else ", started earlier"
                on_output(f"flow run {child.name} ({child.id}){how}")
                try:
                    state = self._wait_for_end(child, on_output, on_progress)
                except BaseException as stop:  # cancelled, or timed out
                    self._leave(child, key, stop, on_output)
                    raise
            if (outcomes := _outcomes(launch)) is not None:
                return outcomes
            if not state.is_cancelled():
                raise _failure(launch.name, child, state)
            on_output("somebody else cancelled it; starting anew (to stop, cancel this pipeline)")
        raise JobFailed(
            f"{launch.name} failed: its flow run was cancelled {MAX_CHILDREN} times, not by this "
            f"pipeline\n{_where(child)}",
            "cancelled",
        )

    @contextlib.contextmanager
    def _waiting(self, key: str) -> Iterator[None]:
        """While the block runs, this pipeline is known to wait for the job with this key."""
        if (own := _own_id()) is None:
            yield
            return
        self._retry(lambda: mark_waiting(self._client, own, key))
        try:
            yield
        finally:
            with contextlib.suppress(httpx.HTTPError):  # its state says that it waits no more
                mark_waiting(self._client, own, None)

    # ------------------------------------------------------------------ start

    def _find_or_start(self, key: str, launch: Launch, report: LineSink) -> tuple[FlowRun, bool]:
        """The running child of this job, or a new one.

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
        child = self._retry(
            lambda: self._create(
                deployment.id,
                parameters=parameters,
                name=f"{launch.name} of {runtime.flow_run.name or 'a pipeline'}",
                tags=[f"job:{key}", f"stage:{launch.name}", f"parent:{parent}"],
                idempotency_key=f"{key}:{len(earlier)}",
            )
        )
        return child, _parent_of(child) == parent  # another pipeline may have been faster

    def _create(self, deployment: UUID, **what: Any) -> FlowRun:
        """Create a child of this task.

        The server records a task up to a few seconds after its start, and refuses a child of a
        task that it has not recorded. So the request is repeated for a while.
        """
        task = _task_run_id()
        began = time.monotonic()
        while True:
            try:
                return self._client.create_flow_run_from_deployment(
                    deployment, parent_task_run_id=task, **what
                )
            except httpx.HTTPStatusError as error:
                unknown = error.response.status_code == 409 and "integrity" in error.response.text
                if task is None or not unknown:
                    raise
                if time.monotonic() - began > RECORDING_SECONDS:
                    task = None  # the tag `parent:` still names the parent
            time.sleep(0.2)

    def _children(self, key: str) -> list[FlowRun]:
        return self._client.read_flow_runs(
            flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[f"job:{key}"])),
            sort=FlowRunSort.EXPECTED_START_TIME_DESC,
            limit=200,
        )

    # ------------------------------------------------------------------ follow

    def _wait_for_end(
        self, child: FlowRun, on_output: LineSink, on_progress: ProgressSink
    ) -> State[Any]:
        """Wait for the end; pass on lines and progress meanwhile."""
        logs = Logs(child.id)
        waits = _Waiting(self.settings, on_output)
        began = time.monotonic()
        while True:
            run = self._retry(lambda: self._client.read_flow_run(child.id))
            for message in self._retry(lambda: logs.new(self._client)):
                progress = parse_progress(message)
                if progress is None:
                    on_output(message)
                else:
                    on_progress(progress)
            state = run.state
            assert state is not None
            if state.is_final() and not self._may_revive(state):
                return state
            if state.is_scheduled() or state.is_pending():
                waits.report(self._client, run)
            time.sleep(FIRST_POLLS if time.monotonic() - began < 60 else POLL_SECONDS)

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


class _Waiting:
    """Reports why a flow run has not started yet."""

    def __init__(self, settings: WorkPoolLauncher, on_output: LineSink) -> None:
        self.settings, self.on_output = settings, on_output
        self.began = time.monotonic()
        self.reported = self.began - WAIT_REPORT_SECONDS + 10  # first after ten seconds

    def report(self, client: Any, run: FlowRun) -> None:
        now = time.monotonic()
        if now - self.began > self.settings.queue_timeout:
            raise JobFailed(
                f"no slot of work pool {run.work_pool_name} became free within "
                f"launcher.queue_timeout, {self.settings.queue_timeout} s: start more workers, or "
                "raise it.",
                category="queue",
            )
        if now - self.reported < WAIT_REPORT_SECONDS:
            return
        self.reported = now
        with contextlib.suppress(httpx.HTTPError):
            self.on_output(f"waiting: {why_it_waits(client, run)}")


def why_it_waits(client: Any, run: FlowRun) -> str:
    """Why a scheduled flow run has not started, in one sentence."""
    pool = run.work_pool_name or ""
    workers = [w for w in client.read_workers_for_work_pool(pool) if w.status == "ONLINE"]
    if not workers:
        return f"no worker of pool {pool} is online; start one: prefect worker start --pool {pool}"
    busy = client.read_flow_runs(
        flow_run_filter=FlowRunFilter.model_validate(
            {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}}
        ),
        limit=100,
    )
    names = [r.name for r in busy if r.work_pool_name == pool and r.id != run.id]
    return (
        f"pool {pool} with {len(workers)} worker{'s' if len(workers) > 1 else ''} is busy with "
        f"{', '.join(names) or 'nothing; the run starts within seconds'}"
    )


# --------------------------------------------------------------------------- helpers


def shared_key(jobs: Iterable[Job]) -> str:
    """Key of jobs that run in one process group: 32 hexadecimal digits."""
    return hashlib.sha256(" ".join(job.key() for job in jobs).encode()).hexdigest()[:32]


def _own_id() -> UUID | None:
    text = runtime.flow_run.id
    return UUID(str(text)) if text else None


def _task_run_id() -> UUID | None:
    text = runtime.task_run.id
    return UUID(str(text)) if text else None


def _parent_of(child: FlowRun) -> str:
    return next((t.removeprefix("parent:") for t in child.tags if t.startswith("parent:")), "")


def _outcomes(launch: Launch) -> list[Outcome] | None:
    """The jobs' results in the store, whoever made them; None if one is missing."""
    store = open_store(launch.store)
    found = [(job, store.stage_result(job.key())) for job in launch.jobs.values()]
    if any(artifact is None for _, artifact in found):
        return None
    return [Outcome(a.digest, a.kind, job.key()) for job, a in found if a is not None]


def _where(child: FlowRun) -> str:
    return f"Flow run: {child.name} ({child.id})"


def _failure(stage: str, child: FlowRun, state: State[Any]) -> JobFailed:
    text = re.sub(rf"^{re.escape(stage)} failed: ", "", state.message or state.name or "")
    where = _where(child)
    if state.is_crashed():
        return JobFailed(f"{stage} failed: the worker or its process was lost\n{where}", "lost")
    return JobFailed(f"{stage} failed: {text}\n{where}", category_of(state.name))
