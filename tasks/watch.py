"""Polls the state of a flow run, and of the pipeline that waits for it, on the server.

A cancelled run stops itself. Prefect leaves that to the worker, which may have been killed, or may
not exist for a run that was started by hand. A run that was declared dead by mistake sets itself to
running: a server that was unavailable for some minutes has missed the heartbeats of healthy runs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import Any
from uuid import UUID

from prefect import runtime
from prefect.client.schemas.objects import State
from prefect.exceptions import Abort, TerminationSignal
from prefect.states import Cancelled, Running

from tasks.waiters import DECLARED_DEAD, key_of, waiters

POLL_SECONDS = 8.0  # asked for by every run; a worker that is there stops a run at once
GRACE_SECONDS = 6.0  # in which the worker, if there is one, stops the run itself


@contextlib.contextmanager
def stop_when_cancelled(pipeline: str | None = None) -> Iterator[None]:
    """Interrupt the block when its flow run, or the pipeline's, is cancelled. Does nothing outside
    of a flow run.

    Args:
        pipeline: id of the flow run that waits for this one. When it is cancelled while other
            pipelines wait for the same job, this run goes on for them.

    Raises:
        Abort: the block was interrupted, and the flow run is marked as cancelled. Prefect's engine
            would report a signal that no worker sent as a crash.
    """
    own = runtime.flow_run.id
    if not own or threading.current_thread() is not threading.main_thread():
        yield
        return
    key = key_of(list(runtime.flow_run.tags or []))
    watch = _Watch(UUID(str(own)), UUID(pipeline) if pipeline else None, key)
    watch.start()
    try:
        yield
    except TerminationSignal:
        if not watch.fired:
            raise
        _mark_cancelled(watch.own)
        raise Abort("The flow run was cancelled.") from None
    finally:
        watch.done.set()


def _mark_cancelled(run: UUID) -> None:
    from prefect.client.orchestration import get_client

    with contextlib.suppress(
        Exception
    ):  # the server is unavailable; its automation will declare the run dead
        get_client(sync_client=True).set_flow_run_state(
            run, Cancelled(message="cancelled; every process has ended"), force=True
        )


class _Watch(threading.Thread):
    def __init__(self, own: UUID, pipeline: UUID | None, key: str | None) -> None:
        super().__init__(name=f"watch {own}", daemon=True)
        self.own, self.pipeline, self.key = own, pipeline, key
        self.done = threading.Event()
        self.fired = False

    def run(self) -> None:
        from prefect.client.orchestration import get_client

        client = get_client(sync_client=True)  # a client for this thread
        while not self.done.wait(POLL_SECONDS):
            if self._must_stop(client):
                if not self.done.wait(GRACE_SECONDS):
                    self.fired = True
                    os.kill(os.getpid(), signal.SIGTERM)
                return

    def _must_stop(self, client: Any) -> bool:
        with contextlib.suppress(Exception):  # the server is unavailable; poll again
            states = self._read(client)
            if _cancelled(states[self.own]) or self._abandoned(client, states):
                return True
            self._revive(client, states[self.own])
        return False

    def _read(self, client: Any) -> dict[UUID, State[Any] | None]:
        """The states of this run and its pipeline, by one request."""
        from tasks.flow_runs import read_all  # imports the launchers, which import this

        wanted = [run for run in (self.own, self.pipeline) if run is not None]
        runs = read_all(client, {"id": {"any_": wanted}})
        return {run.id: run.state for run in runs}

    def _abandoned(self, client: Any, states: Mapping[UUID, State[Any] | None]) -> bool:
        """Whether the pipeline was cancelled, and no other one waits for this run's job."""
        if self.pipeline is None or not _cancelled(states.get(self.pipeline)):
            return False
        return self.key is None or not waiters(client, self.key)

    def _revive(self, client: Any, state: State[Any] | None) -> None:
        if declared_dead(state) and not self.done.is_set():
            alive: State[Any] = Running(
                message="the process is alive; the server had missed its heartbeats"
            )
            client.set_flow_run_state(self.own, alive, force=True)


def _cancelled(state: State[Any] | None) -> bool:
    return state is not None and (state.is_cancelling() or state.is_cancelled())


def declared_dead(state: State[Any] | None) -> bool:
    """Whether a run was declared crashed for missing heartbeats, which may be a mistake."""
    return bool(state and state.is_crashed() and (state.message or "").startswith(DECLARED_DEAD))
