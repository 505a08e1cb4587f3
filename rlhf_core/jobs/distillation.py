"""On-policy distillation: settings, its job, and the import of a teacher."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rlhf_core.jobs.base import BaseJob, Digest, Fraction, PositiveInt, Resources, job_input
from rlhf_core.jobs.training import HeldOutJob, HeldOutSettings


class DistillSettings(HeldOutSettings):
    """On-policy distillation (GKD, arXiv 2306.13649): the student learns a larger model's
    distributions on replies that it samples itself."""

    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-5
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    """Learning rate after the warm-up. cosine and linear end at 0."""
    steps: PositiveInt = 100
    """Number of rollouts, with one optimizer step each."""
    batch_size: PositiveInt = 64
    """Prompts per step over all ranks, with one reply each."""
    max_new_tokens: PositiveInt = 128
    """Longest reply in tokens."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Sampling temperature. The distributions of student and teacher are compared at it."""
    beta: Fraction = 0.5
    """The divergence at each token. 0: forward KL, the student covers all that the teacher says;
    1: reverse KL, it keeps to what the teacher says most; between: generalised Jensen-Shannon."""
    eval_prompts: PositiveInt = 64
    """Held-out prompts of each evaluation during training, see eval_every: the last ones, with the
    same random numbers each time."""


class DistillJob(DistillSettings, HeldOutJob):
    """On-policy distillation."""

    module: ClassVar[str] = "rlhf_core.algorithms.distill"
    kind: ClassVar[str] = "model"

    algorithm: Literal["distill"] = "distill"
    """Name of the algorithm."""
    model: Digest = job_input()
    """Start of the student."""
    teacher: Digest = job_input()
    """Model with the same vocabulary, as a rule a larger one."""
    prompts: Digest = job_input()
    """Data set of purpose prompts."""
    resources: Resources = Resources()
    """Placement of the job."""


class ImportTeacherJob(BaseJob):
    """Imports a teacher into the store, and compares its vocabulary with the base model's."""

    module: ClassVar[str] = "rlhf_core.stages.import_teacher"
    kind: ClassVar[str] = "model"
    torchrun: ClassVar[bool] = False
    # With and without code are two things, as in `ImportModelJob`.
    excluded_from_key: ClassVar[frozenset[str]] = frozenset()

    algorithm: Literal["import_teacher"] = "import_teacher"
    """Name of the stage."""
    source: str
    """artifact:DIGEST, a local folder, a Hugging Face id, or builtin:NAME."""
    model: Digest = job_input()
    """Language model with the same vocabulary."""
    fingerprint: str = ""
    """Fingerprint of the source's contents, so that a changed folder is imported again."""
