"""OpenLineage's events of a run and its stages: `openlineage` in the settings.

    job       <run's name>            its run: the pipeline's, also when it is retried
    job       <run's name>.<stage>    its run: one attempt at a stage; the pipeline's is its parent
    dataset   <kind>/<digest>         an artifact, in the namespace of the store

A reused stage emits START and COMPLETE too, with `reused` in the facet `rlhf_stage`: so the graph
of a run is whole, and runs that share an artifact meet there.

Events go out in order, from a thread of their own. Nothing in here can fail a run or hold it up:
the first problem is logged, and each later event is tried once more.
"""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import UTC, datetime, timedelta
from typing import Any

from prefect import runtime

from rlhf_core.jobs import Job
from rlhf_core.jobs.tracking import OpenLineage
from rlhf_core.system.secrets import redact
from tasks.events import Log, log_event
from tasks.run import Observer, Run, StageResult

PRODUCER = "https://github.com/rlhf-pipeline/rlhf-pipeline"
AT_THE_END = 20.0
"""Seconds in which the last events have to be sent."""

STOPPED = ("preempted", "cancelled")  # categories of failures that are no fault of the stage
ENDS = {"completed": "COMPLETE", "failed": "FAIL", "cancelled": "ABORT"}


class LineageEvents(Observer):
    """Emits the events of a run."""

    def __init__(self, run: Run, settings: OpenLineage, log: Log) -> None:
        self.run, self.settings, self.log = run, settings, log
        self.id = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PRODUCER}/{run.store.url}/{run.id}"))
        self.attempts: Counter[str] = Counter()
        self.open: dict[str, str] = {}  # stage -> id of its attempt that has started
        self.client: Any = None
        self.said = False
        self.sender = ThreadPoolExecutor(1, "openlineage")
        self.sent: list[Future[None]] = []

    def begin(self) -> None:
        self._in_order(self._connect)
        self._emit("START", self.run.config.name, self.id)

    def started(self, stage: str, job: Job) -> None:
        self._start(stage, job.inputs().values())

    def finished(self, result: StageResult) -> None:
        parents = self._try(lambda: self.run.store.get(result.digest).parents) or ()
        if result.stage not in self.open:  # reused, or made by the orchestrator itself
            self._start(result.stage, parents, before=result.seconds)
        output = f"{result.kind}/{result.digest}"
        self._end("COMPLETE", result.stage, parents, output, reused=result.reused)

    def stopped(self, stage: str, error: BaseException) -> None:
        category = getattr(error, "category", None)
        fault = isinstance(error, Exception) and category not in STOPPED
        self._end("FAIL" if fault else "ABORT", stage, error=error)

    def end(self, state: str, error: BaseException | None) -> None:
        if state in ENDS:  # a run that waits for a person goes on later
            self._emit(ENDS[state], self.run.config.name, self.id, error=error)
        self._in_order(lambda: self.client and self.client.close(AT_THE_END))
        wait(self.sent, AT_THE_END)
        self.sender.shutdown(wait=False, cancel_futures=True)

    # ----------------------------------------------------------------------- events

    def _start(self, stage: str, inputs: Iterable[str], before: float = 0.0) -> None:
        self.attempts[stage] += 1
        # A retried pipeline counts its attempts anew.
        name = f"{stage}/{runtime.flow_run.run_count or 0}/{self.attempts[stage]}"
        self.open[stage] = str(uuid.uuid5(uuid.UUID(self.id), name))
        self._emit("START", f"{self.run.config.name}.{stage}", self.open[stage], stage=stage,
                   inputs=inputs, before=before)  # fmt: skip

    def _end(
        self,
        kind: str,
        stage: str,
        inputs: Iterable[str] = (),
        output: str = "",
        error: BaseException | None = None,
        reused: bool = False,
    ) -> None:
        self._emit(kind, f"{self.run.config.name}.{stage}", self.open.pop(stage), stage=stage,
                   inputs=inputs, output=output, error=error, reused=reused)  # fmt: skip

    def _emit(self, kind: str, job: str, run_id: str, *, before: float = 0.0, **parts: Any) -> None:
        when = datetime.now(UTC) - timedelta(seconds=before)
        self._in_order(lambda: self._send(kind, job, run_id, when, **parts))

    def _send(
        self,
        kind: str,
        job: str,
        run_id: str,
        when: datetime,
        *,
        stage: str = "",
        inputs: Iterable[str] = (),
        output: str = "",
        error: BaseException | None = None,
        reused: bool = False,
    ) -> None:
        if self.client is None:
            return
        from openlineage.client.event_v2 import InputDataset, OutputDataset, Run, RunEvent, RunState
        from openlineage.client.event_v2 import Job as LineageJob
        from openlineage.client.facet_v2 import job_type_job

        place = redact(self.run.store.url.rstrip("/"))
        refs = [f"{a.kind}/{a.digest}" for a in map(self.run.store.get, dict.fromkeys(inputs))]
        level = "STAGE" if stage else "PIPELINE"
        kind_of_job = job_type_job.JobTypeJobFacet("BATCH", "RLHF", level, producer=PRODUCER)
        event = RunEvent(
            eventType=RunState[kind],
            eventTime=when.isoformat(),
            run=Run(run_id, self._facets(stage, run_id, error, reused)),
            job=LineageJob(self.settings.namespace, job, {"jobType": kind_of_job}),
            inputs=[InputDataset(place, ref) for ref in refs],
            outputs=[OutputDataset(place, output)] if output else [],
            producer=PRODUCER,
        )
        self.client.emit(event)

    def _facets(
        self, stage: str, run_id: str, error: BaseException | None, reused: bool
    ) -> dict[str, Any]:
        from openlineage.client.facet_v2 import RunFacet, error_message_run, parent_run

        found: dict[str, Any] = {}
        if stage:
            name = self.run.config.name
            parent = parent_run.Job(self.settings.namespace, name)
            found["parent"] = parent_run.ParentRunFacet(
                parent_run.Run(self.id), parent, producer=PRODUCER
            )
            found["rlhf_stage"] = RunFacet(producer=PRODUCER).with_additional_properties(
                run=self.run.id, stage=stage, reused=reused
            )
        if error is not None:
            text = redact(str(error)) or type(error).__name__
            found["errorMessage"] = error_message_run.ErrorMessageRunFacet(
                text, "PYTHON", producer=PRODUCER
            )
        return found

    # ----------------------------------------------------------------------- sending

    def _connect(self) -> None:
        logging.getLogger("openlineage").setLevel(logging.ERROR)  # what matters is said below
        from openlineage.client import OpenLineageClient

        self.client = OpenLineageClient()
        if self.client.transport.kind == "console" and not self.client.config.transport:
            self.client = None
            raise LookupError("no address is set: OPENLINEAGE_URL, or a file openlineage.yml")

    def _in_order(self, call: Callable[[], object]) -> None:
        """Make a call after all earlier ones, without waiting for it."""
        with contextlib.suppress(RuntimeError):  # the interpreter is about to end
            self.sent.append(self.sender.submit(self._try, call))

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # whatever a server, its client or its configuration raise
            if not self.said:
                self.said = True
                reason = redact((str(error) or type(error).__name__).splitlines()[0])[:300]
                text = f"an event could not be sent: {reason}. The run goes on without it."
                log_event(self.log, "warning", "openlineage", text)
        return None
