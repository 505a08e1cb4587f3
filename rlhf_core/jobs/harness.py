"""Standard benchmarks, measured by EleutherAI's lm-evaluation-harness (package lm-eval)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from rlhf_core.jobs.base import (
    LARGEST,
    Digest,
    PositiveInt,
    Resources,
    Settings,
    job_input,
)
from rlhf_core.jobs.data import TrainingData


class LmEvalSettings(Settings):
    """Standard benchmarks of the base and the finished model, by EleutherAI's
    lm-evaluation-harness. They show what the alignment cost or gained elsewhere. Needs the extra
    `lm-eval` where the stage runs."""

    tasks: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    """Tasks, groups or tags, by their names in the harness (arc_easy) or in include_path."""
    num_fewshot: Annotated[int, Field(ge=0, le=LARGEST)] | None = None
    """Solved examples before each question. Empty: the task's own number. A task written for zero
    examples keeps zero."""
    limit: PositiveInt | None = None
    """Measure only the first examples of each task, for a quick look. Empty: all."""
    include_path: Annotated[str, Field(min_length=1)] | None = None
    """Folder with your own task files (YAML). Relative data_files start at this folder. Python
    files run if a task names them. All files in the folder are part of the stage key. With workers
    on other machines, the folder must exist at the same path on each."""
    apply_chat_template: bool = True
    """true: ask each question as a user's turn in the chat template, few-shot examples as earlier
    turns. false: plain text, as base models are usually measured."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of both models. auto: bf16 on GPUs, fp32 on the CPU."""
    resources: Resources | None = None
    """Placement of this stage. Empty: the pipeline's. micro_batch_size is the harness's batch_size
    on each rank."""

    @field_validator("tasks")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if twice := sorted({name for name in value if value.count(name) > 1}):
            raise ValueError(f"{', '.join(twice)} appears twice; name each task once")
        return value


class LmEvalJob(LmEvalSettings, TrainingData):
    """Measures the base and the finished model with the harness."""

    module: ClassVar[str] = "rlhf_core.evaluation.harness.stage"
    kind: ClassVar[str] = "benchmarks"

    algorithm: Literal["lm_eval"] = "lm_eval"
    """Name of the stage."""
    base: Digest = job_input()
    """Base model."""
    policy: Digest = job_input("model")
    """The finished model."""
    prompts: Digest | None = job_input(default=None)
    """Prompts of online RL."""
    fingerprint: str = ""
    """Fingerprint of include_path, so that a changed task is measured again."""
    resources: Resources = Resources()
    """Placement of the job."""
