"""Each flow run looks at its own state, and a stage's run at that of the pipeline that wants it.

A run that is cancelled ends, also where no worker is left to tell it: Prefect leaves it to the
worker to stop a run's process, and when that was killed, or the run was started by hand, nobody
does. And a run that was found dead in error says that it lives: when the server was away for some
minutes, it has missed the heartbeats of healthy runs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any
from uuid import UUID

from prefect import runtime
from prefect.client.schemas.objects import State
from prefect.exceptions import Abort, TerminationSignal
from prefect.states import Cancelled, Running

POLL_SECONDS = 4.0
DECLARED_DEAD = "no heartbeat for"  # how the automation's message begins (flows/automations.py)
GRACE_SECONDS = 6.0  # for the worker, which is told too and knows better how


@contextlib.contextmanager
def stop_when_cancelled(pipeline: str | None = None) -> Iterator[None]:
    """While the block runs, interrupt it once its flow run, or the pipeline's, is cancelled.
    Without a flow run it does nothing.

    Args:
        pipeline: id of the flow run that waits for this one.

    Raises:
        Abort: it was interrupted; the flow run is marked as cancelled. Prefect's engine takes a
            signal that no worker announced for a crash, and would say so.
    """
    own = runtime.flow_run.id
    if not own or threading.current_thread() is not threading.main_thread():
        yield
        return
    watch = _Watch(UUID(str(own)), UUID(pipeline) if pipeline else None)
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

    with contextlib.suppress(Exception):  # the server is away: its automation finds the run dead
        get_client(sync_client=True).set_flow_run_state(
            run, Cancelled(message="cancelled; every process has ended"), force=True
        )


class _Watch(threading.Thread):
    def __init__(self, own: UUID, pipeline: UUID | None) -> None:
        super().__init__(name=f"watch {own}", daemon=True)
        self.own, self.pipeline = own, pipeline
        self.done = threading.Event()
        self.fired = False

    def run(self) -> None:
        from prefect.client.orchestration import get_client

        client = get_client(sync_client=True)  # of this thread's own
        seen: float | None = None
        while not self.done.wait(POLL_SECONDS):
            with contextlib.suppress(Exception):  # a server that is away: look again
                if any(self._cancelled(client, i) for i in (self.own, self.pipeline) if i):
                    seen = seen or time.monotonic()
                else:
                    self._revive(client)
            if seen is not None and time.monotonic() - seen >= GRACE_SECONDS:
                if not self.done.is_set():
                    self.fired = True
                    os.kill(os.getpid(), signal.SIGTERM)
                return

    @staticmethod
    def _cancelled(client: Any, run: UUID) -> bool:
        state = client.read_flow_run(run).state
        return state is not None and (state.is_cancelling() or state.is_cancelled())

    def _revive(self, client: Any) -> None:
        state = client.read_flow_run(self.own).state
        if declared_dead(state) and not self.done.is_set():
            alive: State[Any] = Running(
                message="its process lives; the server had missed its heartbeats"
            )
            client.set_flow_run_state(self.own, alive, force=True)


def declared_dead(state: State[Any] | None) -> bool:
    """Whether a run was declared lost for its silence, which may be an error."""
    return bool(state and state.is_crashed() and (state.message or "").startswith(DECLARED_DEAD))
