"""Standard benchmarks, measured by EleutherAI's lm-evaluation-harness (package lm-eval)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from rlhf_core.jobs.base import (
    LARGEST,
    BaseJob,
    Digest,
    PositiveInt,
    Resources,
    Settings,
    job_input,
)


class LmEvalSettings(Settings):
    """Standard benchmarks: the base and the finished model in EleutherAI's lm-evaluation-harness,
    which shows what the alignment cost or gained elsewhere. Needs the extra `lm-eval` where the
    stage runs."""

    tasks: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    """Tasks, groups or tags by their names in the harness, such as arc_easy, or in include_path."""
    num_fewshot: Annotated[int, Field(ge=0, le=LARGEST)] | None = None
    """Solved examples before each question; empty: as each task says. A task that is written for
    none keeps to that."""
    limit: PositiveInt | None = None
    """Examples of each task at most, the first ones, for a quick look; empty: all."""
    include_path: Annotated[str, Field(min_length=1)] | None = None
    """Folder with task files (YAML) of one's own, as the harness calls it. Relative data_files in
    them start at this folder, and its Python files are run where a task names them. Everything in
    it counts in the stage's identity. With workers on other machines it must be there for both
    workers at the same place, like data that is named by a local path."""
    apply_chat_template: bool = True
    """Put each question to the model as a user's turn, through its chat template, with the
    few-shot examples as turns before it; false: as plain text, as base models are measured."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Numbers that both models compute in; auto: bf16 on GPUs, fp32 on the CPU."""
    resources: Resources | None = None
    """Placement of this stage; empty: the pipeline's. Its micro_batch_size is the harness's
    batch_size, for each rank."""

    @field_validator("tasks")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if twice := sorted({name for name in value if value.count(name) > 1}):
            raise ValueError(f"{', '.join(twice)} is there twice; name each task once")
        return value


class LmEvalJob(LmEvalSettings, BaseJob):
    """Measures two models with the harness."""

    module: ClassVar[str] = "rlhf_core.evaluation.harness.stage"
    kind: ClassVar[str] = "benchmarks"

    algorithm: Literal["lm_eval"] = "lm_eval"
    """Job kind."""
    base: Digest = job_input()
    """Base model."""
    policy: Digest = job_input("model")
    """The finished model."""
    fingerprint: str = ""
    """Identity of the contents of include_path, so that a changed task is measured again."""
    resources: Resources = Resources()
    """Placement."""
