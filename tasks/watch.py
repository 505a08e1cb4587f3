"""A flow run that is cancelled ends, also where no worker is left to tell it.

Prefect leaves it to the worker to stop a run's process. When the worker was killed, or when the run
was started by hand, nobody does: so each run looks at its own state, and a stage's run at that of
the pipeline which wants its result.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from uuid import UUID

from prefect import runtime
from prefect.exceptions import Abort, TerminationSignal

POLL_SECONDS = 4.0
GRACE_SECONDS = 6.0  # for the worker, which is told too and knows better how


@contextlib.contextmanager
def watched(pipeline: str | None = None) -> Iterator[None]:
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
    from prefect.states import Cancelled

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
            if seen is not None and time.monotonic() - seen >= GRACE_SECONDS:
                if not self.done.is_set():
                    self.fired = True
                    os.kill(os.getpid(), signal.SIGTERM)
                return

    @staticmethod
    def _cancelled(client: object, run: UUID) -> bool:
        state = client.read_flow_run(run).state  # type: ignore[attr-defined]
        return state is not None and (state.is_cancelling() or state.is_cancelled())
