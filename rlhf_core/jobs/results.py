"""Evaluation, gates and publishing."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

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
from rlhf_core.jobs.data import TrainingData
from rlhf_core.jobs.ensemble import EnsembleJob
from rlhf_core.jobs.judging import EndpointJudgeSettings
from rlhf_core.jobs.reward_services import without_asking
from rlhf_core.jobs.rewards import Reward
from rlhf_core.jobs.training import Select


class EvaluateSettings(Settings):
    """Comparison of the base, SFT and finished models on held-out prompts."""

    max_prompts: PositiveInt = 128
    """Maximum number of held-out prompts."""
    max_new_tokens: PositiveInt | None = None
    """Longest reply in tokens. Empty: as in the last stage that samples replies."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Sampling temperature of the replies."""
    greedy_prompts: Annotated[int, Field(ge=0, le=LARGEST)] = 32
    """Held-out prompts to which each model also replies greedily (always the likeliest token), as
    many chats do. 0: none."""
    questions: str = "builtin"
    """General questions that each model answers greedily: what it knew, and may have lost. builtin:
    40 short English ones. none. Or your own: a source of rows {question, answers}, such as a path
    or s3:// URL of a .jsonl file; answers is a text, or a list of texts of which one must stand in
    the reply. Read when the stage starts."""
    judge: Literal["none", "vader", "textblob"] = "none"
    """Gold judge, which online RL never sees, reported beside the reward model. vader, textblob:
    sentiment lexicons, made apart. One that labelled the preference pairs is no independent
    judge."""
    judge_endpoint: EndpointJudgeSettings | None = None
    """Judge behind an OpenAI-compatible endpoint. It compares the finished model's reply to each
    prompt with that of the model before the alignment. Empty: none."""
    against_champion: bool | None = None
    """Also compare the finished model with the champion of publish.name, if there is one: on the
    same prompts, with the same judges. true: min_win_rate then applies to this comparison. Empty:
    where publish.promote is earned, since no other evidence makes a later model the champion."""
    samples: PositiveInt = 8
    """Prompts whose replies the report shows."""
    min_win_rate: Fraction | None = None
    """Gate: the run stops before publishing when the finished model wins on a smaller fraction of
    the prompts, against the model before the alignment (with against_champion true: the champion).
    Empty: no gate."""
    max_length_ratio: Annotated[float, Field(gt=0.0)] | None = None
    """Gate: the run stops before publishing when the mean reply is longer than this many times that
    of the model before the alignment. Empty: no gate."""
    resources: Resources | None = None
    """Placement of this stage. Empty: the pipeline's."""


class PublishSettings(Settings):
    """Publishing of the finished model."""

    name: Slug = "chat-model"
    """Name of the published model, for `rlhf chat`, `rlhf serve` and `rlhf models`."""
    promote: Literal["earned", "always"] = "earned"
    """When the finished model becomes the champion of its name. earned: unless the verdict of the
    evaluation is worse or reward hacked; where there is a champion, only if the comparison with it
    (evaluate.against_champion) shows a gain or reaches evaluate.min_win_rate. Other models are kept
    as candidates. always: every model that passes its gates."""
    select: Select = "best"
    """Which weights a training stage with eval_every makes its result. best: those of its best
    evaluation on held-out rows, in online RL within kl_budget. last: those of its last step."""
    approval: Literal["none", "manual"] = "none"
    """manual: the run pauses before publishing, with the report and a form on its Prefect page."""
    approval_timeout: Annotated[int, Field(ge=10, le=LARGEST)] = 604_800
    """Seconds that the run waits for the decision before it fails."""


class Gates(Settings):
    """Gates of a retraining: bounds that the new model must keep to be published."""

    min_reward_accuracy: Fraction = 0.5
    """Lowest accuracy of the reward model on held-out pairs."""
    max_kl: Annotated[float, Field(gt=0.0)] = 50.0
    """Largest KL of the new model to its SFT model, in nats per reply."""
    min_win_rate: Fraction = 0.5
    """Lowest fraction of held-out prompts on which the new model wins against the published one, or
    against the SFT model when none is published. The gold judge decides if there is one, else the
    new reward model."""


class GeneralQuestion(Settings):
    """A question, and the answers of which one must stand in a reply."""

    question: Annotated[str, Field(min_length=1)]
    """The user's message."""
    answers: Annotated[tuple[str, ...], Field(min_length=1)]
    """Accepted answers."""


class EvaluateJob(EvaluateSettings, TrainingData, EnsembleJob):
    """Evaluation on held-out data."""

    version: ClassVar[int] = 4
    module: ClassVar[str] = "rlhf_core.evaluation.evaluate"
    kind: ClassVar[str] = "evaluation"
    excluded_from_key: ClassVar[frozenset[str]] = BaseJob.excluded_from_key | {
        "min_win_rate", "max_length_ratio", "against_champion"
    }  # fmt: skip

    algorithm: Literal["evaluate"] = "evaluate"
    """Name of the stage."""
    max_new_tokens: PositiveInt = 128
    """Longest reply in tokens."""
    base: Digest = job_input()
    """Base model."""
    sft: Digest | None = job_input(default=None)
    """Model before the alignment, and the reference of the KL. Empty: base."""
    policy: Digest = job_input("model")
    """The finished model."""
    reward_model: Digest | None = job_input(default=None)
    """Reward model, if there is one."""
    rewards: tuple[Reward, ...] = ()
    """Rewards of the last stage of online RL, if rules are among them. Empty: the reward model
    alone."""
    own_questions: tuple[GeneralQuestion, ...] = ()
    """The rows of `questions`, if that is a source."""
    prompts: Digest = job_input()
    """Data set of purpose prompts."""
    resources: Resources = Resources()
    """Placement of the job."""

    def key_settings(self) -> dict[str, Any]:
        """Leaves out how services that score replies are asked."""
        settings = super().key_settings()
        without_asking(self.rewards, settings["rewards"])
        return settings
