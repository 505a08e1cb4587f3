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
from rlhf_core.jobs.data import (
    DataConfig,
    DataJob,
    DataSettings,
    ImportModelJob,
    LabelJob,
    ModelSettings,
    SampledPreferences,
)
from rlhf_core.jobs.launchers import Launcher, LocalLauncher, WorkPoolLauncher
from rlhf_core.jobs.online import PPOJob, PPOSettings
from rlhf_core.jobs.pipeline import PipelineConfig
from rlhf_core.jobs.pretraining import (
    NewModelJob,
    NewModelSettings,
    PretrainJob,
    PretrainSettings,
)
from rlhf_core.jobs.results import EvaluateJob, EvaluateSettings, Gates, PublishSettings
from rlhf_core.jobs.training import (
    LoRA,
    RewardJob,
    RewardSettings,
    SFTJob,
    SFTSettings,
    TrainSettings,
)

__all__ = [
    "JOB", "LARGEST", "BaseJob", "DataConfig", "DataJob", "DataSettings", "Digest", "EvaluateJob",
    "EvaluateSettings", "Format", "Fraction", "Gates", "ImportModelJob", "Job", "LabelJob",
    "Launcher", "LoRA", "LocalLauncher", "ModelSettings", "NewModelJob", "NewModelSettings",
    "PPOJob", "PPOSettings", "PipelineConfig", "PositiveInt", "Precision", "PretrainJob",
    "PretrainSettings", "PublishSettings", "Purpose", "Resources",
    "RewardJob", "RewardSettings", "SFTJob", "SFTSettings", "SampledPreferences", "Seed",
    "Settings", "Slug", "Strategy", "TrainSettings", "WorkPoolLauncher", "parse_job",
]  # fmt: skip

Job = (
    ImportModelJob
    | DataJob
    | NewModelJob
    | PretrainJob
    | SFTJob
    | LabelJob
    | RewardJob
    | PPOJob
    | EvaluateJob
)
JOB: TypeAdapter[Job] = TypeAdapter(Job)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"a key is there twice in an object with the keys {list(value)[:20]}")
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
        raise ValueError(f"it holds a JSON {type(data).__name__}; needed is an object")
    for candidate in get_args(Job):
        if candidate.model_fields["algorithm"].default == data.get("algorithm"):
            return cast(Job, candidate.model_validate(data))  # one class's errors, not seven's
    return JOB.validate_python(data)
