"""Who is told what happens to a run: its mirror in MLflow, OpenLineage's events."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from prefect.exceptions import Pause

from tasks.events import Log
from tasks.openlineage import LineageEvents
from tasks.run import Observer, Run
from tasks.tracking import Mirror


@contextlib.contextmanager
def observed(run: Run, log: Log) -> Iterator[None]:
    """Tell the observers that the run's settings ask for what happens inside the block."""
    config = run.config
    observers: list[Observer] = []
    if config.tracking is not None:
        observers.append(Mirror(run, config.tracking, log))
    if config.openlineage is not None:
        observers.append(LineageEvents(run, config.openlineage, log))
    run.observers = observers
    for observer in observers:
        observer.begin()
    ended: BaseException | None = None
    try:
        yield
    except BaseException as error:
        ended = error
        raise
    finally:
        run.observers = []
        for observer in observers:
            observer.end(state_after(ended), ended)


def state_after(error: BaseException | None) -> str:
    """How a run ended: completed, failed, cancelled, or waiting (for a person)."""
    if error is None:
        return "completed"
    if isinstance(error, Pause):
        return "waiting"
    return "failed" if isinstance(error, Exception) else "cancelled"
