"""Evaluation, gates and publishing."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rlhf_core.jobs.base import (
    LARGEST,
    BaseJob,
    Digest,
    Fraction,
    PositiveInt,
    Resources,
    Settings,
    Slug,
    job_input,
)
from rlhf_core.jobs.judging import EndpointJudgeSettings


class EvaluateSettings(Settings):
    """Comparison of the base, SFT and finished models on held-out prompts."""

    max_prompts: PositiveInt = 128
    """Held-out prompts at most."""
    max_new_tokens: PositiveInt | None = None
    """Longest reply; empty: ppo.max_new_tokens."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Sampling temperature of the replies."""
    judge: Literal["none", "vader"] = "none"
    """Gold judge that training never sees, reported beside the reward model."""
    judge_endpoint: EndpointJudgeSettings | None = None
    """A judge behind an OpenAI-compatible endpoint, asked for each prompt whether the finished
    model's reply or that of the model it started from is better; empty: none."""
    against_champion: bool = False
    """Compare the finished model also with the champion of publish.name, where there is one: on the
    same held-out prompts, by the same judges. min_win_rate is then about that comparison."""
    samples: PositiveInt = 8
    """Prompts shown with each model's reply in the report."""
    min_win_rate: Fraction | None = None
    """Gate: the run stops before publishing when the finished model's replies beat those of the
    model it started from (of the champion, with against_champion) on less than this share of the
    prompts; empty: no gate."""
    max_length_ratio: Annotated[float, Field(gt=0.0)] | None = None
    """Gate: the run stops before publishing when its replies are longer than this many times those
    of the model it started from; empty: no gate."""
    resources: Resources | None = None
    """Placement of this stage; empty: the pipeline's."""


class PublishSettings(Settings):
    """The finished model."""

    name: Slug = "chat-model"
    """Name under which the model is published and found by `rlhf chat`."""
    approval: Literal["none", "manual"] = "none"
    """manual: the run waits before publishing, with the report and a form on its page."""
    approval_timeout: Annotated[int, Field(ge=10, le=LARGEST)] = 604_800
    """Seconds that it waits for the decision before it fails."""


class Gates(Settings):
    """Bounds that a retrained model must keep before it is published."""

    min_reward_accuracy: Fraction = 0.5
    """Accuracy of the reward model on held-out pairs, at least."""
    max_kl: Annotated[float, Field(gt=0.0)] = 50.0
    """KL of the new model to its SFT model, nats per reply, at most."""
    min_win_rate: Fraction = 0.5
    """Share of held-out prompts on which the new model's reply beats the published model's (the
    SFT model's where none is published), at least; judged by the gold judge where there is one,
    else by the new reward model."""


class EvaluateJob(EvaluateSettings, BaseJob):
    """Evaluation on held-out data."""

    version: ClassVar[int] = 2
    module: ClassVar[str] = "rlhf_core.evaluation.evaluate"
    kind: ClassVar[str] = "evaluation"
    excluded_from_key: ClassVar[frozenset[str]] = BaseJob.excluded_from_key | {
        "min_win_rate", "max_length_ratio", "against_champion"
    }  # fmt: skip

    algorithm: Literal["evaluate"] = "evaluate"
    """Job kind."""
    max_new_tokens: PositiveInt = 128
    """Longest reply."""
    base: Digest = job_input()
    """Base model."""
    sft: Digest | None = job_input(default=None)
    """Model that the alignment started from, and the reference of the KL; empty: base."""
    policy: Digest = job_input("model")
    """The finished model."""
    reward_model: Digest | None = job_input(default=None)
    """Reward model, where there is one."""
    prompts: Digest = job_input()
    """Data set of purpose prompts."""
    sft_data: Digest | None = job_input("sft", default=None)
    """Data set of purpose sft, for the held-out loss."""
    resources: Resources = Resources()
    """Placement."""
