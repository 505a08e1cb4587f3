"""Scheduled retraining: it trains when there is new data, and publishes only a better model."""

from __future__ import annotations

import hashlib
import json
import time
from typing import Annotated, Any

from prefect import flow, runtime
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Completed
from pydantic import Field

from flows import schedule
from flows.form import Preset, form_config, run_name
from flows.rlhf import Returned, ending, new_run, pipeline
from rlhf_core.data.fingerprint import fingerprint as data_fingerprint
from rlhf_core.errors import GateFailed, RLHFError
from rlhf_core.jobs import Gates, PipelineConfig
from rlhf_core.model_files.source import fingerprint as model_fingerprint
from rlhf_core.pipeline.recipe import data_sets, evaluation_stages
from rlhf_core.store import Store
from tasks import stages
from tasks.events import log_event, tidy_logs
from tasks.gates import judge
from tasks.observers import observed
from tasks.promotion import refusal
from tasks.publish import compare_with_champion, keep_candidate, publish
from tasks.reporting.evaluation import read_evaluation
from tasks.reporting.report import report
from tasks.run import Run, now, recorded
from tasks.watch import stop_when_cancelled

tidy_logs()

# Settings that change no result: a change of them is no reason to train again.
NOT_PART_OF_STATE = {
    "resources",
    "launcher",
    "name",
    "author",
    "gpu_hour_price",
    "tracking",
    "openlineage",
    "priority",
}


def _run_name() -> str:
    given = runtime.flow_run.parameters
    settings = given.get("settings") or ""
    try:
        config = form_config(given.get("preset") or "none", settings, "x")
    except RLHFError:  # the flow says what is wrong
        return run_name("", settings)
    return run_name("", settings, f"retrain-{config.publish.name}")


@flow(name="rlhf-retrain", flow_run_name=_run_name, persist_result=False)
def rlhf_retrain(
    preset: Preset = "none",
    settings: str = "",
    gates: Gates = Gates(),  # noqa: B008 (frozen)
    force: bool = False,
    jitter: Annotated[int, Field(ge=0, le=86_400)] = 0,
) -> Returned:
    """Trains when data, model or settings are new, and publishes a model that passes the gates.
    One that fails a gate is kept as a candidate.

    Args:
        preset: settings to start from; `rlhf presets` says what each is for.
        settings: what differs from the preset, as YAML. docs/settings.md lists all settings.
        gates: what the new model must reach, on its own and against the published one.
        force: train also when nothing is new.
        jitter: seconds; the run starts at a random moment within them. For the parameters of a
            schedule that many systems have, so that they do not start all at once.
    """

    def body() -> State[Any]:
        config = form_config(preset, settings, _run_name(), log=get_run_logger())
        return retrain(config, gates, force, jitter)

    return ending(body)


def retrain(config: PipelineConfig, gates: Gates, force: bool, jitter: int) -> State[Any]:
    """The body of the flow."""
    log = get_run_logger()
    log_event(log, "note", "retrain", f"{schedule.trains(config)}")
    flow_run = runtime.flow_run.id
    if (other := schedule.superseded_at(flow_run)) is not None:
        text = f"missed; the run of {other:%Y-%m-%d %H:%M:%S %Z} did its work"
        log_event(log, "note", "retrain", f"skipped: {text}")
        return Completed(name=schedule.SKIPPED, message=text)
    with stop_when_cancelled():
        schedule.wait(jitter, flow_run, log)
    began = time.monotonic()
    run = new_run(config)
    state = _source_state(config, run.store)
    path = f"retrain/{config.publish.name}.json"
    last = run.store.read_record(path) or {}
    if last.get("state") == state and not force:
        text = f"no new data since {last.get('time')} ({time.monotonic() - began:.1f} s)"
        log_event(log, "note", "retrain", text)
        return Completed(name="NothingNew", message=text)
    with stop_when_cancelled():
        last_stage = evaluation_stages(config)[-1]
        stages.preflight(config, last_stage)
        with recorded(run), observed(run, log):
            verdict = _train(run, gates, last_stage)
            report(run)
            create_markdown_artifact(
                verdict["markdown"], key="promotion", description=verdict["text"]
            )
    # Written last, so that a run that died in the middle is repeated.
    run.store.write_record(
        path,
        {"state": state, "time": now(), "run": run.id, "promoted": not verdict["failed"]},
    )
    log_event(log, "note", "retrain", verdict["text"])
    name = "Rejected" if verdict["failed"] else "Promoted"
    text = verdict["text"]
    if run.verdict.get("state") == "reward hacked":
        name = "RewardHacked"
        text = text if '"reward hacked"' in text else f"{text}\n{run.verdict['text']}"
    return Completed(name=name, message=text, data=run.summary())


def _train(run: Run, gates: Gates, last_stage: str) -> dict[str, Any]:
    """Run the pipeline, and publish the model or keep it as a candidate.

    Args:
        last_stage: the last one before publishing.

    Returns:
        The verdict of the gates, as `judge` gives it.
    """
    try:
        for stage in pipeline(run):
            if stage == last_stage:
                break
        verdict = _compare(run, gates)
        why = refusal(run) if run.config.publish.promote == "earned" else None
        if why and not verdict["failed"]:
            text = f"not promoted: {why}"
            verdict = {
                "failed": ["verdict"],
                "text": text,
                "markdown": f"{verdict['markdown']}\n\nAll gates passed, but {text}",
            }
    except GateFailed as failed:  # one of the pipeline's own gates
        text = f"not promoted: {failed}"
        verdict = {"failed": ["pipeline"], "text": text, "markdown": text}
    if "evaluate" in run.stages:
        model, evaluation = run.artifacts_by_role["model"], run.stages["evaluate"].digest
        if verdict["failed"]:
            keep_candidate(run, model, evaluation, verdict["text"])
        else:
            publish(run, model, evaluation)
    return verdict


def _source_state(config: PipelineConfig, store: Store) -> str:
    """Digest of the settings and of all data and models that they name."""
    parts = {
        "config": config.model_dump(mode="json", exclude=NOT_PART_OF_STATE),
        "model": model_fingerprint(config.model.source, config.model.revision),
        "data": {
            name: data_fingerprint(settings, store) for _, name, settings in data_sets(config)
        },
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _compare(run: Run, gates: Gates) -> dict[str, Any]:
    """Judge the new model by the gates, and against the champion if there is one."""
    evaluation = read_evaluation(run.store, run.stages["evaluate"].digest)
    compared = compare_with_champion(run)
    comparison = read_evaluation(run.store, compared.digest) if compared is not None else None
    return judge(gates, evaluation, comparison)
