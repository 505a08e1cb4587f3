"""One run of the pipeline: settings, store, folder, and the run's record in the store."""

from __future__ import annotations

import contextlib
import getpass
import logging
import os
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect.exceptions import Pause
from prefect.utilities.urls import url_for
from pydantic import BaseModel, ConfigDict

from rlhf_core.errors import StoreError
from rlhf_core.jobs import Job, PipelineConfig
from rlhf_core.store import Store, open_store, rlhf_home
from rlhf_core.system.secrets import redact

log = logging.getLogger("rlhf")


class StageResult(BaseModel):
    """The result of a stage: a small reference; the data are in the store.

    Attributes:
        seconds: that this run waited for it: for a place to run, for the work, or for the store,
            and between two attempts.
        work: what making it took, in whichever run, see `rlhf_core.runtime.work`; without the
            steps. {} for what the orchestrator itself makes, and for results of older versions.
    """

    model_config = ConfigDict(frozen=True)

    stage: str
    digest: str
    kind: str
    key: str
    reused: bool
    seconds: float
    work: dict[str, Any] = {}
    metrics: dict[str, Any] = {}

    @property
    def shown(self) -> dict[str, Any]:
        """The metrics and the throughput."""
        return {**self.metrics, **self.work.get("throughput", {})}

    @property
    def worked(self) -> float:
        """Seconds of work in this run; the others of `seconds` it waited."""
        if self.reused:
            return 0.0
        return min(self.seconds, float(self.work.get("seconds", self.seconds)))

    @property
    def ref(self) -> str:
        """kind/digest[:12], which all `rlhf artifacts` commands take."""
        return f"{self.kind}/{self.digest[:12]}"


class Observer:
    """Is told what happens to a run and its stages. This one does nothing."""

    def begin(self) -> None:
        """The run begins, or goes on after a pause."""

    def started(self, stage: str, job: Job) -> None:
        """An attempt at a stage begins. Stages that are reused never do."""

    def finished(self, result: StageResult) -> None:
        """A stage is done."""

    def stopped(self, stage: str, error: BaseException) -> None:
        """The attempt at a stage ended without its result."""

    def end(self, state: str, error: BaseException | None) -> None:
        """The run ends. state: completed, failed, cancelled or waiting (for a person)."""


class Run:
    """Passed to every task. Not a dataclass, since Prefect searches those for futures."""

    def __init__(
        self,
        config: PipelineConfig,
        run_id: str,
        store: Store | None = None,
        flow_run: str | None = None,
        lasting: bool = True,
    ) -> None:
        """
        Args:
            flow_run: its id on the Prefect server. lasting: whether the server outlives the run.
        """
        self.flow_run = flow_run
        self.lasting = lasting
        self.config = config
        self.author = config.author or author()
        self.started = now()
        self.id = run_id
        self.store = store or open_store(config.store)
        self.folder = rlhf_home() / "runs" / run_id
        self.stages: dict[str, StageResult] = {}
        self.began: dict[str, float] = {}  # stage -> monotonic time of its first attempt
        # role of a stage's input (see job_input) -> digest
        self.artifacts_by_role: dict[str, str] = {}
        self.model_folder: Path | None = None
        self.report: Path | None = None
        self.observers: list[Observer] = []
        self.decision: dict[str, Any] = {}  # of the person who approved or rejected it
        self.verdict: dict[str, Any] = {}  # of the evaluation, see `Verdict.record`
        self.version: dict[str, Any] = {}  # of its model: name, number, digest, state, reason
        self._record: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"Run({self.id!r})"

    @property
    def record_path(self) -> str:
        return f"runs/{self.id}.json"

    @property
    def page(self) -> str | None:
        """URL of the run's page on the Prefect server; None on one that ends with the run."""
        return url_for("flow-run", self.flow_run) if self.flow_run and self.lasting else None

    def begin(self) -> None:
        """Write the record for the first time, or again when the run is retried."""
        earlier = self.store.read_record(self.record_path) or {}
        self.started = earlier.get("started") or self.started
        self._record = {
            "id": self.id,
            "name": self.config.name,
            "started": self.started,
            "config": self.config.model_dump(mode="json"),
            "author": self.author,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "flow_run": self.flow_run,
            "page": self.page,
            "folder": str(self.folder),
        }
        self.save(state="running", ended=None, error=None)

    def add(self, result: StageResult) -> StageResult:
        """Add a finished stage."""
        self.stages[result.stage] = result
        self.save()
        for observer in self.observers:
            observer.finished(result)
        return result

    def save(self, **changes: Any) -> None:
        """Write the record."""
        self._record |= changes
        self._record |= {
            "updated": now(),
            "stages": {name: r.model_dump(exclude={"stage"}) for name, r in self.stages.items()},
            "verdict": self.verdict.get("state"),
        }
        self.store.write_record(self.record_path, self._record)

    def finish(self, state: str, error: BaseException | None = None) -> None:
        """Write how the run ended; an unavailable store must not replace the reason."""
        text = None if error is None else redact(str(error)) or type(error).__name__
        category = getattr(error, "category", None) if error is not None else None
        try:
            self.save(state=state, ended=now(), error=text, category=category)
        except StoreError as problem:
            log.warning("the record of run %s could not be written: %s", self.id, problem)

    def summary(self) -> dict[str, Any]:
        """The flow's return value."""
        return {
            "run": self.id,
            "stages": {name: r.model_dump() for name, r in self.stages.items()},
            "verdict": self.verdict,
            "version": self.version,
            "model": str(self.model_folder) if self.model_folder else None,
            "report": str(self.report) if self.report else None,
        }


@contextlib.contextmanager
def recorded(run: Run) -> Iterator[Run]:
    """Write the run's record, with its final state however the block ends."""
    run.begin()
    try:
        yield run
    except Exception as error:
        run.finish("failed", error)
        raise
    except Pause:
        run.save(state="waiting for approval")
        raise
    except BaseException:  # Ctrl-C, or Prefect's TerminationSignal
        run.finish("cancelled")
        raise
    run.finish("completed")


def new_run_id(
    flow_run_id: str | None, scheduled: datetime | None = None, name: str | None = None
) -> str:
    """Scheduled time, first digits of the flow run's id, and name, so that a retry has the same
    id. The run's folder, its record and the models it publishes have it."""
    when = scheduled or datetime.now(UTC)
    start = f"{when:%Y%m%d-%H%M%S}-{(flow_run_id or os.urandom(4).hex())[:8]}"
    return f"{start}-{name}" if name else start


def author() -> str:
    """$RLHF_AUTHOR, else the user of this process."""
    if named := os.environ.get("RLHF_AUTHOR", "").strip():
        return named
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return f"user {os.getuid()}"


def now() -> str:
    """ISO 8601, UTC, seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def elapsed(since: float) -> float:
    """Seconds since a `time.monotonic()`, rounded for a record."""
    return round(time.monotonic() - since, 2)
