"""One Prefect task per stage: each describes its job and runs it, or finds its result.

Call them directly, never with .submit(): a submitted task's thread does not get the exception
that a cancelled run raises, and its processes would go on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from prefect import Task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Completed

from rlhf_core.data.fingerprint import fingerprint as data_fingerprint
from rlhf_core.errors import PreflightError
from rlhf_core.jobs import (
    DataJob,
    DataSettings,
    EvaluateJob,
    ImportModelJob,
    Job,
    LabelJob,
    PipelineConfig,
    PPOJob,
    Purpose,
    Resources,
    RewardJob,
    SampledPreferences,
    Settings,
    SFTJob,
)
from rlhf_core.preflight import check
from rlhf_core.source_id import fingerprint as model_fingerprint
from tasks.events import say
from tasks.execute import run_jobs, worth_a_retry
from tasks.run import Run, StageResult

RETRY_DELAYS = [5.0, 30.0]
"""Seconds before the second and the third attempt."""

Function = TypeVar("Function", bound=Callable[..., Any])


def stage(name: str) -> Callable[[Function], Function]:
    """A task that is tried again when that can help; the store, not Prefect, knows its results."""

    def decorate(function: Function) -> Function:
        return StageTask(  # type: ignore[return-value]
            _showing_reuse(function),
            name=name,
            task_run_name=name,
            retries=len(RETRY_DELAYS),
            retry_delay_seconds=RETRY_DELAYS,
            retry_condition_fn=worth_a_retry,
            cache_policy=NO_CACHE,
            persist_result=False,
        )

    return decorate


class StageTask(Task[..., Any]):
    """A task that may end in a state of its own choice; the caller gets the result all the same."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        returned = super().__call__(*args, **kwargs)
        return returned.result() if isinstance(returned, State) else returned


def _showing_reuse(function: Callable[..., Any]) -> Callable[..., Any]:
    """A stage whose results were all in the store ends as Cached, and says what was reused."""

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
def preflight(config: PipelineConfig) -> None:
    """Everything that can be known before anything starts, in one list."""
    problems = check(config)
    if problems:
        raise PreflightError(problems)
    say(get_run_logger(), "note", "preflight", "passed")


@stage("model")
def import_model(run: Run) -> StageResult:
    """The base model, in the store."""
    settings = run.config.model
    job = ImportModelJob(
        **values(settings),
        seed=run.config.seed,
        fingerprint=model_fingerprint(settings.source, settings.revision),
    )
    return run_one(run, "model", job)


@stage("data")
def prepare_data(run: Run, model: str) -> dict[str, StageResult]:
    """The data sets, by purpose; prepared in one process, which saves the imports.

    Args:
        model: digest of the base model, whose tokenizer is used.
    """
    data = run.config.data
    wanted: dict[Purpose, DataSettings] = {"sft": data.sft, "prompts": data.prompts}
    if isinstance(data.preference, DataSettings):
        wanted["preference"] = data.preference
    if data.ptx is not None and run.config.ppo.ptx_coef > 0:
        wanted["pretrain"] = data.ptx
    jobs = {
        f"data-{purpose}": DataJob(
            **values(settings),
            seed=run.config.seed,
            purpose=purpose,
            model=model,
            trust_remote_code=run.config.model.trust_remote_code,
            fingerprint=data_fingerprint(settings),
        )
        for purpose, settings in wanted.items()
    }
    results = run_jobs(run, "data", jobs, get_run_logger())
    return dict(zip(map(str, wanted), results, strict=True))


@stage("sft")
def sft(run: Run, model: str, data: str) -> StageResult:
    """Supervised fine-tuning of the base model."""
    settings = run.config.sft
    job = SFTJob(**trained(run, settings), model=model, data=data)
    return run_one(run, "sft", job)


@stage("label")
def label(run: Run, model: str, prompts: str) -> StageResult:
    """Preference pairs: replies of the SFT model, compared by the labeller."""
    settings = run.config.data.preference
    assert isinstance(settings, SampledPreferences)
    job = LabelJob(**trained(run, settings), model=model, prompts=prompts)
    return run_one(run, "label", job)


@stage("reward")
def reward(run: Run, model: str, data: str) -> StageResult:
    """The reward model, trained from the SFT model."""
    job = RewardJob(**trained(run, run.config.reward), model=model, data=data)
    return run_one(run, "reward", job)


@stage("ppo")
def ppo(run: Run, model: str, reward_model: str, prompts: str, ptx: str | None) -> StageResult:
    """The aligned model."""
    settings = run.config.ppo
    job = PPOJob(
        **trained(run, settings),
        model=model,
        reward_model=reward_model,
        prompts=prompts,
        ptx=ptx if settings.ptx_coef > 0 else None,
    )
    return run_one(run, "ppo", job)


@stage("evaluate")
def evaluate(
    run: Run, base: str, sft: str, policy: str, reward_model: str, prompts: str, sft_data: str
) -> StageResult:
    """Base, SFT and aligned model on held-out prompts."""
    return run_evaluation(
        run, "evaluate", base=base, sft=sft, policy=policy, reward_model=reward_model,
        prompts=prompts, sft_data=sft_data,
    )  # fmt: skip


@stage("compare")
def compare(run: Run, champion: str) -> StageResult:
    """The aligned model against a published one on the same held-out prompts.

    Args:
        champion: digest of the published model's policy; it stands where SFT stands otherwise.
    """
    done = {name: result.digest for name, result in run.stages.items()}
    return run_evaluation(
        run, "compare", base=done["model"], sft=champion, policy=done["ppo"],
        reward_model=done["reward"], prompts=done["data-prompts"], sft_data=done["data-sft"],
    )  # fmt: skip


def run_evaluation(run: Run, name: str, **inputs: str) -> StageResult:
    """The result of an evaluation of three models, given by their digests."""
    settings = trained(run, run.config.evaluate)
    settings["max_new_tokens"] = settings["max_new_tokens"] or run.config.ppo.max_new_tokens
    return run_one(run, name, EvaluateJob(**settings, **inputs))


def run_one(run: Run, name: str, job: Job) -> StageResult:
    """The result of a stage of one job."""
    return run_jobs(run, name, {name: job}, get_run_logger())[0]


def values(settings: Settings) -> dict[str, Any]:
    """The fields of a settings object, but for its placement."""
    names = [name for name in type(settings).model_fields if name != "resources"]
    return {name: getattr(settings, name) for name in names}


def trained(run: Run, settings: Settings) -> dict[str, Any]:
    """The fields of a stage that runs on ranks: settings, seed, and the placement that holds."""
    own: Resources | None = getattr(settings, "resources", None)
    resources = own or run.config.resources
    return {
        **values(settings),
        "seed": run.config.seed,
        "resources": resources,
        "trust_remote_code": run.config.model.trust_remote_code,
    }
