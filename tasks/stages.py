"""One Prefect task per stage: each makes its job and runs it, or reuses its result.

Call them directly, never with .submit(): the thread of a submitted task does not get the exception
that cancels a run, and its processes would run on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast, get_args

from prefect import Task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Completed

from rlhf_core.data.fingerprint import fingerprint as data_fingerprint
from rlhf_core.data.questions import read_questions
from rlhf_core.errors import GateFailed, PreflightError
from rlhf_core.evaluation.harness.tasks import fingerprint as tasks_fingerprint
from rlhf_core.jobs import (
    BaseJob,
    EvaluateJob,
    ImportModelJob,
    ImportRewardJob,
    Job,
    LabelJob,
    LmEvalJob,
    ModelReward,
    NewModelJob,
    OnlineSettings,
    PipelineConfig,
    Resources,
    Settings,
    TrainingData,
    TrainingStage,
    TrainSettings,
)
from rlhf_core.jobs.best_of_n import BestOfNJob
from rlhf_core.jobs.distillation import ImportTeacherJob
from rlhf_core.jobs.ensemble import CombineSettings
from rlhf_core.jobs.training import HeldOutSettings
from rlhf_core.model_files.source import fingerprint as model_fingerprint
from rlhf_core.pipeline import recipe
from rlhf_core.pipeline.placements import reply_length
from rlhf_core.preflight.check import check
from tasks import data_jobs
from tasks.events import log_event
from tasks.execute import run_jobs, should_retry
from tasks.gates import check_reward
from tasks.launchers import check_launcher
from tasks.run import Run, StageResult

RETRY_DELAYS = [5.0, 30.0]
"""Seconds before the second and the third attempt."""

Function = TypeVar("Function", bound=Callable[..., Any])


def stage(name: str) -> Callable[[Function], Function]:
    """A task that is retried when a retry can help. The store caches results, not Prefect."""

    def decorate(function: Function) -> Function:
        return StageTask(  # type: ignore[return-value]
            _report_reuse(function),
            name=name,
            task_run_name=name,
            retries=len(RETRY_DELAYS),
            retry_delay_seconds=RETRY_DELAYS,
            retry_condition_fn=should_retry,
            cache_policy=NO_CACHE,
            persist_result=False,
        )

    return decorate


class StageTask(Task[..., Any]):
    """A task that may return a Prefect state; its caller gets the state's result."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        returned = super().__call__(*args, **kwargs)
        return returned.result() if isinstance(returned, State) else returned


def _report_reuse(function: Callable[..., Any]) -> Callable[..., Any]:
    """End a stage in the state Cached if all its results were reused."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        found = list(result.values()) if isinstance(result, dict) else [result]
        if not found or not all(isinstance(r, StageResult) and r.reused for r in found):
            return result
        refs = ", ".join(r.ref for r in found)
        return Completed(name="Cached", message=f"reused {refs}", data=result)

    return run


@stage("preflight")
def preflight(config: PipelineConfig, until: str = "publish") -> None:
    """Check settings and resources before anything starts; reports all problems in one list."""
    remarks: list[str] = []
    problems = check(config, remarks=remarks) + check_launcher(config, remarks)
    problems += recipe.check_until(config, until)
    if problems:
        raise PreflightError(problems)
    for remark in remarks:
        log_event(get_run_logger(), "note", "preflight", remark)
    log_event(get_run_logger(), "note", "preflight", "passed")


@stage("model")
def import_model(run: Run) -> StageResult:
    """Import the base model into the store, or make a new one from scratch."""
    if run.config.new_model is not None:
        text = run.config.data.pretrain
        assert text is not None, "checked by the preflight"
        new = NewModelJob(
            **settings_fields(run.config.new_model),
            seed=run.config.seed,
            text=text,
            fingerprint=data_fingerprint(text),
        )
        return run_job(run, "model", new)
    settings = run.config.model
    job = ImportModelJob(
        **settings_fields(settings),
        seed=run.config.seed,
        fingerprint=model_fingerprint(settings.source, settings.revision),
    )
    return run_job(run, "model", job)


@stage("reward-model")
def import_reward(run: Run, source: str, model: str, name: str = "reward-model") -> StageResult:
    """Import an existing reward model into the store.

    Args:
        model: digest of the base model, whose vocabulary it must share.
        name: of the stage, another one for each of several.
    """
    job = ImportRewardJob(
        source=source,
        model=model,
        seed=run.config.seed,
        trust_remote_code=run.config.model.trust_remote_code,
        fingerprint=model_fingerprint(source, None),
    )
    return run_job(run, name, job)


@stage("teacher")
def import_teacher(run: Run, model: str) -> StageResult:
    """Import the teacher of a distillation into the store.

    Args:
        model: digest of the base model, whose vocabulary it must share.
    """
    source = run.config.teacher
    assert source is not None, "no stage of a run without one"
    job = ImportTeacherJob(
        source=source,
        model=model,
        seed=run.config.seed,
        trust_remote_code=run.config.model.trust_remote_code,
        fingerprint=model_fingerprint(source, None),
    )
    return run_job(run, "teacher", job)


@stage("data")
def prepare_data(run: Run, model: str) -> dict[str, StageResult]:
    """Prepare the data sets, all in one process, because its imports take long; then mix.

    Args:
        model: digest of the base model, whose tokenizer is used.

    Returns:
        Name of the data set in the settings -> result.
    """
    jobs = data_jobs.source_jobs(run, model)
    results = dict(zip(jobs, run_jobs(run, "data", jobs, get_run_logger()), strict=True))
    if mixtures := data_jobs.mixture_jobs(run, model, results):
        mixed = run_jobs(run, "mix", mixtures, get_run_logger())
        results |= dict(zip(mixtures, mixed, strict=True))
    names = [setting.rpartition(".")[2] for _, setting, _ in recipe.data_sets(run.config)]
    return {name: results[f"data-{name}"] for name in names}


@stage("label")
def label(run: Run, step: recipe.Step, artifacts: dict[str, str]) -> StageResult:
    """Make preference pairs: replies of the newest model, compared by the labeller."""
    _, settings = recipe.label_settings(run.config, step)
    inputs = {name: artifacts[role] for name, role in LabelJob.roles().items() if role in artifacts}
    if settings.labeller != "reward_model":
        inputs.pop("reward_model", None)
    else:
        inputs |= ensemble(run, artifacts)
    margins = "reward" in run.config.stages and run.config.reward.margin_coef > 0
    job = LabelJob(**job_fields(run, settings, step), **inputs, margins=margins)
    return run_job(run, step.name, job)


@stage("best_of_n")
def best_of_n(run: Run, step: recipe.Step, artifacts: dict[str, str]) -> StageResult:
    """Make demonstrations: the best of several replies of the newest model."""
    section = run.config.rejection_sampling
    roles = recipe.roles(run.config, "best_of_n")
    inputs = {name: artifacts[role] for name, role in roles.items() if role in artifacts}
    if section.wants_reward_model:
        inputs |= ensemble(run, artifacts)
    job = BestOfNJob(**fields_of(BestOfNJob, job_fields(run, section, step)), **inputs)
    return run_job(run, step.name, job)


def _training_task(algorithm: str) -> Callable[..., StageResult]:
    @stage(algorithm)
    def train(run: Run, step: recipe.Step, artifacts: dict[str, str]) -> StageResult:
        """Run a training stage.

        Args:
            artifacts: role of an input (see `job_input`) -> digest.
        """
        roles = recipe.roles(run.config, algorithm)
        inputs = {name: artifacts[role] for name, role in roles.items() if role in artifacts}
        section = recipe.section(run.config, algorithm)
        if isinstance(section, OnlineSettings) and section.wants_reward_model:
            inputs |= ensemble(run, artifacts)
        fields = fields_of(step.job, job_fields(run, section, step))
        job = cast(Job, step.job(**fields, **inputs))
        result = run_job(run, step.name, job)
        wrong = check_reward(run.config.reward, result.metrics) if algorithm == "reward" else None
        if wrong is not None:
            raise GateFailed(wrong)
        return result

    return train


TRAIN = {algorithm: _training_task(algorithm) for algorithm in get_args(TrainingStage)}
"""The task of each training stage."""


@stage("evaluate")
def evaluate(run: Run, artifacts: dict[str, str]) -> StageResult:
    """Evaluate the base model, the model that the alignment started from, and the final one."""
    return run_evaluation(run, "evaluate", artifacts)


@stage("lm_eval")
def benchmark(run: Run, artifacts: dict[str, str]) -> StageResult:
    """Run standard benchmarks on the base model and the final one."""
    settings = run.config.lm_eval
    assert settings is not None, "no stage of a run without these settings"
    job = LmEvalJob(
        **job_fields(run, settings),
        fingerprint=tasks_fingerprint(settings.include_path),
        **{n: artifacts[role] for n, role in LmEvalJob.roles().items() if role in artifacts},
    )
    return run_job(run, "lm_eval", job)


@stage("compare")
def compare(run: Run, artifacts: dict[str, str], champion: str) -> StageResult:
    """Evaluate the final model against a published one on the same held-out prompts.

    Args:
        champion: digest of the published policy, which takes the place of the SFT model.
    """
    return run_evaluation(run, "compare", {**artifacts, "start": champion})


def run_evaluation(run: Run, name: str, artifacts: dict[str, str]) -> StageResult:
    """Run an evaluation of up to three models.

    Args:
        artifacts: role -> digest, with "base", "model" (the final one) and "start" (the model
            that the alignment started from).
    """
    settings = job_fields(run, run.config.evaluate)
    settings["max_new_tokens"] = reply_length(run.config)
    rewards = recipe.online_rewards(run.config)
    rules = any(not isinstance(reward, ModelReward) for reward in rewards)
    questions = settings["questions"]
    start = artifacts.get("start")
    job = EvaluateJob(
        **settings,
        base=artifacts["base"],
        sft=start if start not in (artifacts["base"], artifacts["model"]) else None,
        policy=artifacts["model"],
        reward_model=artifacts.get("reward_model"),
        rewards=rewards if rules else (),
        own_questions=() if questions in ("builtin", "none") else read_questions(questions),
        prompts=artifacts["prompts"],
        **{name: artifacts.get(role) for name, role in TrainingData.roles().items()},
        **ensemble(run, artifacts),
    )
    return run_job(run, name, job)


def ensemble(run: Run, artifacts: dict[str, str]) -> dict[str, Any]:
    """The fields of an `EnsembleJob` for the run's reward models; empty for one."""
    roles = [recipe.member_role(i) for i in range(1, recipe.reward_models(run.config))]
    if not roles:
        return {}
    how = {name: getattr(run.config.reward, name) for name in CombineSettings.model_fields}
    return {"ensemble": tuple(artifacts[role] for role in roles), **how}


def run_job(run: Run, name: str, job: Job) -> StageResult:
    """Run a stage that has one job."""
    return run_jobs(run, name, {name: job}, get_run_logger())[0]


def fields_of(job: type[BaseJob], fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that a job has: rejection sampling is one section of settings and two jobs."""
    return {name: value for name, value in fields.items() if name in job.model_fields}


def settings_fields(settings: Settings) -> dict[str, Any]:
    """The fields of a settings object, without its placement."""
    names = [name for name in type(settings).model_fields if name != "resources"]
    return {name: getattr(settings, name) for name in names}


def job_fields(run: Run, settings: Settings, step: recipe.Step | None = None) -> dict[str, Any]:
    """The fields of a job that runs on ranks: settings, seed, and its placement."""
    own: Resources | None = getattr(settings, "resources", None)
    resources = own or run.config.resources
    elsewhere: dict[str, Any] = {}  # what the configuration has once for all stages that train
    if isinstance(settings, TrainSettings):
        elsewhere["quantization"] = run.config.model.quantization
    if isinstance(settings, HeldOutSettings):
        elsewhere["select"] = run.config.publish.select
    return {
        **settings_fields(settings),
        **elsewhere,
        "seed": run.config.seed
        # another order of the data in each round, and for each member of an ensemble
        + (step.round + step.member if step else 0),
        "resources": resources,
        "trust_remote_code": run.config.model.trust_remote_code,
    }
