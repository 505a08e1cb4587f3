"""The pipeline: from a base model to an aligned chat model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

from prefect import flow, runtime
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Completed

from flows import approval, server
from rlhf_core.errors import GateFailed, JobFailed, RewardHacked, RLHFError
from rlhf_core.jobs import PipelineConfig, TrainingStage
from rlhf_core.pipeline import recipe
from tasks import stages
from tasks.events import log_event, tidy_logs
from tasks.flow_runs import failed
from tasks.gates import check_evaluation
from tasks.launchers import launcher_for
from tasks.observers import observed
from tasks.promotion import promotion_of
from tasks.publish import compare_with_champion, keep_candidate, keep_last_good_policy, publish
from tasks.reporting.curves import prepare
from tasks.reporting.evaluation import Evaluation, evaluation_of, read_evaluation
from tasks.reporting.report import render, report
from tasks.run import Run, new_run_id, recorded
from tasks.watch import stop_when_cancelled

Stage = Literal[
    "model", "data", "label", "best_of_n", TrainingStage, "evaluate", "lm_eval", "publish"
]

Returned = dict[str, Any] | State[dict[str, Any]]

tidy_logs()


@flow(name="rlhf-pipeline", flow_run_name="{config.name}", persist_result=False)
def rlhf_pipeline(
    config: PipelineConfig = PipelineConfig(),  # noqa: B008 (frozen)
    until: Stage = "publish",
) -> Returned:
    """Runs data preparation, the training stages, evaluation and publishing.

    Results that are in the store are reused, whichever run made them.

    Args:
        config: all settings of the run.
        until: last stage to run.
    """
    return ending(run_pipeline, config, until)


def ending(body: Callable[..., Returned], *arguments: Any) -> Returned:
    """What a flow's body returns; for an error with a message, a failed state with its name."""
    try:
        return body(*arguments)
    except RLHFError as error:
        return failed(error)


def run_pipeline(config: PipelineConfig, until: Stage = "publish") -> Returned:
    """The body of a pipeline's flow."""
    launcher_for(config.launcher).prepare()
    run = new_run(config)
    log_event(
        get_run_logger(), "run", "", f"run {run.id}, store {run.store.url}",
        id=run.id, name=config.name, store=run.store.url, url=run.page,
    )  # fmt: skip
    approval.check(config)
    with stop_when_cancelled():
        stages.preflight(config, until)
        threading.Thread(target=prepare, name="imports", daemon=True).start()
        with recorded(run), observed(run, get_run_logger()):
            for stage in pipeline(run):
                if stage == until:
                    break
            report(run)
    return outcome(run)


def new_run(config: PipelineConfig) -> Run:
    """The run of this flow run."""
    here = runtime.flow_run
    run_id = new_run_id(here.id, here.scheduled_start_time, config.name)
    return Run(config, run_id, flow_run=here.id, lasting=server.temporary is None)


def outcome(run: Run) -> Returned:
    """The run's summary, in a state whose name says so when its reward was hacked or its model is
    not the champion."""
    hacked = run.verdict.get("state") == "reward hacked"
    found = [f'The verdict is "reward hacked". {run.verdict["text"]}'] if hacked else []
    name = "RewardHacked"
    if run.decision.get("decision") == "reject":
        name = "Rejected"
        found.insert(0, f"not published: {run.decision.get('reason') or 'no reason given'}")
    elif run.version and run.version["state"] != "champion":
        name = name if hacked else "NotPromoted"
        version, number = run.version["name"], run.version["number"]
        found = [
            f"version {number} of {version} is a candidate, {run.version['reason']}",
            f"To promote it by hand: rlhf models promote {version} {number}",
        ]
    if not found:
        return run.summary()
    return Completed(name=name, message="\n".join(found), data=run.summary())


def pipeline(run: Run) -> Iterator[str]:
    """Run the stages one after another; yields the name of each when it is done."""
    artifacts = run.artifacts_by_role
    artifacts["base"] = artifacts["start"] = artifacts["model"] = stages.import_model(run).digest
    import_rewards(run)
    if run.config.teacher is not None:
        artifacts["teacher"] = stages.import_teacher(run, artifacts["base"]).digest
    yield "model"

    data = stages.prepare_data(run, artifacts["base"])
    artifacts |= {name: result.digest for name, result in data.items()}
    if "ptx" not in data and "sft" in data:
        artifacts["ptx"] = data["sft"].digest
    yield "data"

    steps = recipe.steps(run.config)
    for number, step in enumerate(steps):
        if step.algorithm == "label":
            artifacts["preference"] = stages.label(run, step, artifacts).digest
        elif step.algorithm == "best_of_n":
            artifacts["best_of_n"] = stages.best_of_n(run, step, artifacts).digest
        else:
            try:
                result = stages.TRAIN[step.algorithm](run, step, artifacts)
            except JobFailed as failed:
                if failed.candidate:
                    raise keep_last_good_policy(run, failed) from None
                raise
            artifacts[step.result_role] = result.digest
            if step.algorithm in recipe.BEFORE_ALIGNMENT and result.kind == "model":
                artifacts["start"] = result.digest
        again = any(later.algorithm == step.algorithm for later in steps[number + 1 :])
        yield step.name if again else step.algorithm

    if not recipe.produces_model(run.config):
        return
    evaluation = evaluated(run)
    yield "evaluate"

    if run.config.lm_eval is not None:
        stages.benchmark(run, artifacts)
        judged(run, evaluation)  # again, with what the alignment cost there
        yield "lm_eval"

    if run.config.publish.approval == "manual":
        decision = approval.ask(run.config, render(run, images={}))
        run.decision = decision.model_dump()
        if decision.decision == "reject":
            reason = f"rejected: {decision.reason or 'no reason given'}"
            keep_candidate(run, artifacts["model"], evaluation, reason)
            return
    promotion = promotion_of(run)
    if promotion.promoted:
        publish(run, artifacts["model"], evaluation, promotion.reason)
    else:
        reason = f"not promoted: {promotion.reason}"
        keep_candidate(run, artifacts["model"], evaluation, reason)
    yield "publish"


def judged(run: Run, digest: str) -> Evaluation:
    """The evaluation with this digest, which gives the run its verdict."""
    shown = evaluation_of(run, digest)
    if conclusion := shown.conclusion():
        run.verdict = conclusion.record()
    return shown


def import_rewards(run: Run) -> None:
    """Import the existing reward models that the run uses, if any."""
    artifacts, given = run.artifacts_by_role, recipe.imported_rewards(run.config)
    for number, source in enumerate(given):
        name = "reward-model" if len(given) == 1 else f"reward-model-{number + 1}"
        found = stages.import_reward(run, source, artifacts["base"], name)
        artifacts[recipe.member_role(number)] = found.digest


def evaluated(run: Run) -> str:
    """Evaluate the final model, which gives the run its verdict; returns the evaluation's digest.

    Raises:
        GateFailed: a gate failed; the model is a candidate.
    """
    artifacts = run.artifacts_by_role
    evaluation = stages.evaluate(run, artifacts)
    settings, made_by = run.config.evaluate, recipe.model_stages(run.config)[-1]
    wanted = settings.against_champion
    if wanted is None:
        wanted = run.config.publish.promote == "earned"
    compared = compare_with_champion(run) if wanted else None
    shown = judged(run, evaluation.digest)
    beside = None
    if compared is not None and settings.against_champion:
        beside = read_evaluation(run.store, compared.digest)
    if wrong := check_evaluation(settings, shown.data, made_by, beside):
        hacked = run.verdict.get("state") == "reward hacked"
        if hacked:
            wrong += f' The verdict is "reward hacked". {run.verdict["text"]}'
        keep_candidate(run, artifacts["model"], evaluation.digest, wrong)
        raise (RewardHacked if hacked else GateFailed)(wrong)
    return evaluation.digest
