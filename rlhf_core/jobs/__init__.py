"""Jobs: the one contract between orchestrator and training. No torch in here.

A *settings* class describes what a person chooses; a *job* is the same settings with every input
named by its artifact digest. Each algorithm has one frozen job class; `Job` is the plain union of
them (`Field(discriminator=...)` breaks Prefect's form). A job file is `job.model_dump_json()`.
"""

from __future__ import annotations

import json
from typing import Any, cast, get_args

from pydantic import TypeAdapter

from rlhf_core.jobs.base import (
    LARGEST,
    BaseJob,
    Digest,
    Format,
    Fraction,
    PositiveInt,
    Precision,
    Purpose,
    Resources,
    Seed,
    Settings,
    Slug,
    Strategy,
)
from rlhf_core.jobs.best_of_n import BestOfNJob, RejectionSamplingJob
from rlhf_core.jobs.data import (
    DataConfig,
    DataJob,
    ImportModelJob,
    ImportRewardJob,
    LabelJob,
    MixedData,
    MixJob,
    ModelSettings,
    SampledPreferences,
    TrainingData,
)
from rlhf_core.jobs.distillation import DistillJob, ImportTeacherJob
from rlhf_core.jobs.harness import LmEvalJob, LmEvalSettings
from rlhf_core.jobs.judging import EndpointJudgeSettings
from rlhf_core.jobs.launchers import Launcher, LocalLauncher, Priority, WorkPoolLauncher
from rlhf_core.jobs.lora import LoRA
from rlhf_core.jobs.online import OnlineJob, OnlineSettings
from rlhf_core.jobs.online_dpo import OnlineDPOJob
from rlhf_core.jobs.pipeline import PipelineConfig, TrainingStage
from rlhf_core.jobs.policy_gradient import (
    GRPOJob,
    GRPOSettings,
    PPOJob,
    PPOSettings,
    ReinforcePPJob,
    ReinforcePPSettings,
    RLOOJob,
    RLOOSettings,
)
from rlhf_core.jobs.preference import (
    DPOJob,
    DPOSettings,
    KTOJob,
    KTOSettings,
    ORPOJob,
    ORPOSettings,
    PreferenceJob,
    SimPOJob,
    SimPOSettings,
)
from rlhf_core.jobs.pretraining import NewModelJob, NewModelSettings, PretrainJob, PretrainSettings
from rlhf_core.jobs.results import EvaluateJob, EvaluateSettings, Gates, PublishSettings
from rlhf_core.jobs.rewards import ModelReward, Reward
from rlhf_core.jobs.rollouts import BuiltinRollout, Rollout, RolloutCorrection, VllmRollout
from rlhf_core.jobs.sources import DataSettings, MixSource, Mixture, Source
from rlhf_core.jobs.training import (
    RewardJob,
    RewardSettings,
    SFTJob,
    SFTSettings,
    TrainJob,
    TrainSettings,
)

__all__ = [
    "JOB",
    "LARGEST",
    "BaseJob",
    "BuiltinRollout",
    "DPOJob",
    "DPOSettings",
    "DataConfig",
    "DataJob",
    "DataSettings",
    "Digest",
    "EndpointJudgeSettings",
    "EvaluateJob",
    "EvaluateSettings",
    "Format",
    "Fraction",
    "GRPOJob",
    "GRPOSettings",
    "Gates",
    "ImportModelJob",
    "ImportRewardJob",
    "Job",
    "KTOJob",
    "KTOSettings",
    "LabelJob",
    "Launcher",
    "LmEvalJob",
    "LmEvalSettings",
    "LoRA",
    "LocalLauncher",
    "MixJob",
    "MixSource",
    "MixedData",
    "Mixture",
    "ModelReward",
    "ModelSettings",
    "NewModelJob",
    "NewModelSettings",
    "ORPOJob",
    "ORPOSettings",
    "OnlineJob",
    "OnlineSettings",
    "PPOJob",
    "PPOSettings",
    "PipelineConfig",
    "PositiveInt",
    "Precision",
    "PreferenceJob",
    "PretrainJob",
    "PretrainSettings",
    "Priority",
    "PublishSettings",
    "Purpose",
    "RLOOJob",
    "RLOOSettings",
    "ReinforcePPJob",
    "ReinforcePPSettings",
    "Resources",
    "Reward",
    "RewardJob",
    "RewardSettings",
    "Rollout",
    "RolloutCorrection",
    "SFTJob",
    "SFTSettings",
    "SampledPreferences",
    "Seed",
    "Settings",
    "SimPOJob",
    "SimPOSettings",
    "Slug",
    "Source",
    "Strategy",
    "TrainJob",
    "TrainSettings",
    "TrainingData",
    "TrainingStage",
    "VllmRollout",
    "WorkPoolLauncher",
    "job_class",
    "parse_job",
]

Job = (
    ImportModelJob | ImportRewardJob | DataJob | MixJob | SFTJob | LabelJob | RewardJob | PPOJob
    | DPOJob | KTOJob | ORPOJob | SimPOJob | GRPOJob | RLOOJob | ReinforcePPJob | BestOfNJob
    | OnlineDPOJob | RejectionSamplingJob | ImportTeacherJob | DistillJob | NewModelJob
    | PretrainJob | EvaluateJob | LmEvalJob
)  # fmt: skip
JOB: TypeAdapter[Job] = TypeAdapter(Job)


def job_class(algorithm: str) -> type[BaseJob]:
    """The job class of an algorithm."""
    classes = cast("tuple[type[BaseJob], ...]", get_args(Job))
    return next(c for c in classes if c.model_fields["algorithm"].default == algorithm)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"an object has a key twice; its keys: {list(value)[:20]}")
    return value


def parse_job(text: str | bytes) -> Job:
    """Read a job file.

    Raises:
        ValueError: the text is not JSON, or (pydantic.ValidationError) not a job of any known
            algorithm.
    """
    try:
        data = json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply to be read") from None
    if not isinstance(data, dict):
        raise ValueError(f"it holds a JSON {type(data).__name__}, but a job is an object")
    for candidate in get_args(Job):
        if candidate.model_fields["algorithm"].default == data.get("algorithm"):
            return cast(Job, candidate.model_validate(data))  # one class's errors, not seven's
    return JOB.validate_python(data)
