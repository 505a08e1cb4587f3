"""Mirrors a run to MLflow, as it goes: `tracking` in the settings.

Nothing in here can fail a run: the first problem is logged, and no further call is made.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any

from rlhf_core.jobs import PipelineConfig
from rlhf_core.jobs.tracking import MlflowTracking
from rlhf_core.store import Store, registry
from rlhf_core.system.secrets import redact
from tasks.events import Log, log_event
from tasks.reporting.cost import cost
from tasks.reporting.curves import read_metrics
from tasks.reporting.differences import changed, numbers
from tasks.reporting.evaluation import read_evaluation
from tasks.reporting.report import CURVES, LINEAGE
from tasks.run import Observer, Run, StageResult

ID = "rlhf.run"  # tag: the run's id
AT_ONCE = 1000  # metrics in one request; MLflow takes no more
PARAMETERS_AT_ONCE = 100
LONGEST = 500  # characters of a parameter


# Of a run of MLflow, after each way in which a run of the pipeline ends.
STATUS = {
    "completed": "FINISHED", "failed": "FAILED", "cancelled": "KILLED", "waiting": "SCHEDULED",
}  # fmt: skip


class Mirror(Observer):
    """A run of MLflow beside a run of the pipeline. A retried run goes on in the same one."""

    def __init__(self, run: Run, settings: MlflowTracking, log: Log) -> None:
        self.run, self.settings, self.log = run, settings, log
        self.failed = False
        self.client: Any = None
        self.id = ""

    def begin(self) -> None:
        """Open the run, with its settings as parameters."""
        self._try(self._begin)

    def finished(self, result: StageResult) -> None:
        """Send the metrics of a finished stage: those of its steps, and its result."""
        self._try(lambda: self._stage(result))

    def end(self, state: str, error: BaseException | None) -> None:
        """Send report, evaluation and the model's version, and close the run."""
        self._try(self._end)
        self._try(lambda: self.client.set_terminated(self.id, status=STATUS[state]))

    def _try(self, call: Callable[[], None]) -> None:
        if self.failed:
            return
        try:
            call()
        except Exception as error:  # whatever a server, its client or its database raise
            self.failed = True
            reason = redact((str(error) or type(error).__name__).splitlines()[0])[:300]
            text = f"MLflow at {self.settings.uri} failed: {reason}. The run goes on without it."
            log_event(self.log, "warning", "tracking", text)

    def _begin(self) -> None:
        self.client = connect(self.settings.uri)
        name = self.settings.experiment
        known = self.client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self.client.create_experiment(name)
        earlier = self.client.search_runs([experiment], f"tags.`{ID}` = '{self.run.id}'")
        if earlier:
            self.id = earlier[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
        else:
            tags = {ID: self.run.id, "mlflow.user": self.run.author}
            opened = self.client.create_run(experiment, run_name=self.run.config.name, tags=tags)
            self.id = opened.info.run_id
        from mlflow.entities import Param

        sent = [Param(key, value) for key, value in parameters(self.run.config).items()]
        for start in range(0, len(sent), PARAMETERS_AT_ONCE):
            self.client.log_batch(self.id, params=sent[start : start + PARAMETERS_AT_ONCE])

    def _stage(self, result: StageResult) -> None:
        from mlflow.entities import Metric

        now, name = round(time.time() * 1000), result.stage
        sent = [
            Metric(f"{name}/{key}", value, now, int(line["step"]))
            for line in read_metrics(self.run.store, result.digest)
            for key, value in numbers(line).items()
            if key not in ("step", "total", "time")
        ]
        took = cost([result], self.run.config.gpu_hour_price)
        totals = {**numbers(result.metrics), "work_seconds": took.work, "gpu_hours": took.gpu_hours}
        sent += [Metric(f"{name}/{k.replace(':', '.')}", v, now, 0) for k, v in totals.items()]
        for start in range(0, len(sent), AT_ONCE):
            self.client.log_batch(self.id, metrics=sent[start : start + AT_ONCE])

    def _end(self) -> None:
        run = self.run
        tags = {
            "rlhf.store": run.store.url,
            "rlhf.page": run.page or "",
            "rlhf.verdict": run.verdict.get("state", ""),
            "mlflow.note.content": run.verdict.get("text", ""),
        }
        for key, value in tags.items():
            self.client.set_tag(self.id, key, redact(value))
        for file in ("report.md", "report.html", CURVES, LINEAGE):
            if (run.folder / file).exists():
                self.client.log_artifact(self.id, str(run.folder / file))
        if "evaluate" in run.stages:
            found = read_evaluation(run.store, run.stages["evaluate"].digest)
            self.client.log_dict(self.id, found, "evaluation.json")
        if run.version and self.settings.registry:
            self._register(run.version)

    def _register(self, version: dict[str, Any]) -> None:
        """Register the run's version, and give the champion its alias. The registered version
        points to its model card: the weights stay in the store."""
        from mlflow.exceptions import MlflowException

        name, store = version["name"], self.run.store
        with contextlib.suppress(MlflowException):  # there is one
            self.client.create_registered_model(name)
        known = versions(self.client, name)
        if version["digest"] not in known:
            card = store.read_bytes(version["digest"], "README.md").decode()
            self.client.log_text(self.id, card, "model_card/README.md")
            self.client.create_model_version(
                name,
                source=f"runs:/{self.id}/model_card",
                run_id=self.id,
                tags={
                    "rlhf.digest": version["digest"],
                    "rlhf.version": str(version["number"]),
                    "rlhf.store": store.url,
                },
                description=f"rlhf artifacts pull published/{version['digest'][:12]} FOLDER",
            )
            known = versions(self.client, name)
        mark_champion(self.client, store, name, known)


def connect(uri: str) -> Any:
    """A client of MLflow, which neither sends telemetry nor waits long for a server."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # it does not heed DO_NOT_TRACK=1
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def parameters(config: PipelineConfig) -> dict[str, str]:
    """The settings that differ from the defaults, as texts."""
    return {
        key: redact(str(value))[:LONGEST]
        for key, value in changed(config).items()
        if not key.startswith("tracking.")
    }


def versions(client: Any, name: str) -> dict[str, str]:
    """Digest of each registered version of a model -> MLflow's number of it."""
    found = client.search_model_versions(f"name = '{name}'")
    return {v.tags["rlhf.digest"]: v.version for v in found if "rlhf.digest" in v.tags}


def mark_champion(client: Any, store: Store, name: str, known: dict[str, str]) -> None:
    """Give the alias `champion` to the champion in the store; take it away from any other."""
    digest = registry.champion(store, name)
    if digest in known:
        client.set_registered_model_alias(name, "champion", known[digest])
    elif "champion" in client.get_registered_model(name).aliases:
        client.delete_registered_model_alias(name, "champion")
