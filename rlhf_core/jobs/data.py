"""The base model and the data sets."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rlhf_core.jobs.base import (
    LARGEST,
    BaseJob,
    Digest,
    PositiveInt,
    Purpose,
    Quantization,
    Resources,
    Settings,
    Slug,
    job_input,
)
from rlhf_core.jobs.ensemble import EnsembleJob
from rlhf_core.jobs.judging import EndpointJudgeSettings, RubricJudgeSettings, without_asking
from rlhf_core.jobs.sources import DataSettings, EpochSettings, Mixture, Share, Source


class ModelSettings(Settings):
    """The base language model."""

    source: str = "builtin:smollm2-135m-instruct"
    """A Hugging Face id, a local folder, artifact:DIGEST, builtin:smollm2-135m-instruct, or
    random:NAME (llama, qwen2, gpt2, opt, bloom): a tiny untrained model for tests."""
    revision: str | None = None
    """Branch, tag or commit on the hub. Empty: the default branch."""
    chat_template: (
        Literal["auto", "chatml", "llama3", "alpaca", "vicuna", "plain", "hermes"]
        | Annotated[str, Field(pattern=r"^tokenizer:.+$")]
    ) = "auto"
    """A built-in chat template; auto: the tokenizer's own, or chatml if it has none;
    tokenizer:NAME: one of several that the tokenizer has. hermes is chatml with tools."""
    trust_remote_code: bool = False
    """Allow Python code that comes with the model to run."""
    quantization: Quantization | None = None
    """How the stages hold frozen weights. nf4: 4 bits (QLoRA, package bitsandbytes); each training
    stage then needs lora, and the strategy ddp. Empty: not quantised."""


class SampledPreferences(Settings):
    """Preference pairs made as in InstructGPT: sampled from the SFT model, then compared."""

    source: Literal["sampled"] = "sampled"
    """Sample replies from the SFT model to the prompts of data.prompts."""
    labeller: Literal["vader", "textblob", "reward_model", "endpoint"] = "vader"
    """Who compares two replies. vader, textblob: a sentiment lexicon, the more positive reply wins;
    reward_model: the pipeline's reward model; endpoint: the model that judge names (RLAIF)."""
    judge: EndpointJudgeSettings | RubricJudgeSettings | None = None
    """Judge of the labeller endpoint. type endpoint: it compares every two replies to a prompt, in
    both orders, n (n - 1) requests for n replies; type rubric: it rates each reply, and the better
    rated one wins (see min_margin)."""
    max_prompts: PositiveInt = 256
    """Maximum number of training prompts."""
    max_heldout_prompts: PositiveInt = 64
    """Maximum number of held-out prompts. Each gives one pair: its best and its worst reply."""
    samples_per_prompt: Annotated[int, Field(ge=2, le=LARGEST)] = 4
    """Replies per prompt. All comparisons between the replies to a training prompt become pairs."""
    max_new_tokens: PositiveInt = 64
    """Longest reply in tokens."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Sampling temperature."""
    min_margin: Annotated[float, Field(ge=0.0)] = 0.05
    """Smallest difference of the labeller's scores. Closer pairs are dropped and counted."""
    resources: Resources | None = None
    """Placement of the label stage. Empty: the pipeline's."""

    @model_validator(mode="after")
    def _judge_is_there(self) -> Self:
        if (self.labeller == "endpoint") != (self.judge is not None):
            found = "empty" if self.judge is None else "set"
            raise ValueError(
                f"labeller is {self.labeller} and judge is {found}; set labeller to endpoint and "
                "give a judge, such as {type: endpoint, url: ..., model: ...}, or neither"
            )
        return self

    @property
    def labeller_name(self) -> str:
        """For people."""
        return self.labeller if self.judge is None else f"the judge {self.judge.model}"


class DataConfig(Settings):
    """The data sets of the pipeline: each is one source, or a mixture of several."""

    pretrain: Source | None = None
    """Plain text for the stage pretrain."""
    sft: Source = DataSettings()
    """Demonstrations for the stage sft."""
    preference: SampledPreferences | DataSettings | Mixture = SampledPreferences()
    """Preference pairs: a data set, or sampled from the SFT model and labelled."""
    unpaired: Source | None = None
    """Single replies labelled good or bad (format unpaired), for the stage kto. Empty: the
    preference pairs, each as one good and one bad reply."""
    prompts: Source = DataSettings()
    """Prompts for online RL and for the evaluation."""
    rounds: SampledPreferences = SampledPreferences(labeller="reward_model")
    """Pairs of each round when rounds is above 1: sampled from the newest policy."""
    ptx: Source | None = None
    """Data mixed into online RL when its ptx_coef is above 0. Empty: the SFT data."""


class ImportModelJob(ModelSettings, BaseJob):
    """Imports a base model into the store: safetensors, tokenizer, chat template."""

    module: ClassVar[str] = "rlhf_core.stages.import_model"
    kind: ClassVar[str] = "model"
    torchrun: ClassVar[bool] = False
    # With and without code are two things; the model is stored as it is, not quantised.
    excluded_from_key: ClassVar[frozenset[str]] = frozenset({"quantization"})

    algorithm: Literal["import_model"] = "import_model"
    """Name of the stage."""
    fingerprint: str = ""
    """Fingerprint of the source's contents, so that a changed folder is imported again."""


class ImportRewardJob(BaseJob):
    """Imports an existing reward model into the store."""

    module: ClassVar[str] = "rlhf_core.stages.import_reward"
    kind: ClassVar[str] = "reward_model"
    torchrun: ClassVar[bool] = False
    excluded_from_key: ClassVar[frozenset[str]] = frozenset()

    algorithm: Literal["import_reward"] = "import_reward"
    """Name of the stage."""
    source: str
    """artifact:DIGEST, a local folder or a Hugging Face id."""
    revision: str | None = None
    """Branch, tag or commit on the hub. Empty: the default branch."""
    model: Digest = job_input()
    """Language model with the same vocabulary."""
    fingerprint: str = ""
    """Fingerprint of the source's contents, so that a changed folder is imported again."""


class DataJob(DataSettings, BaseJob):
    """Reads, checks, splits and tokenises one data set."""

    module: ClassVar[str] = "rlhf_core.stages.prepare_data"
    kind: ClassVar[str] = "dataset"
    version: ClassVar[int] = 4  # verdicts and flags are read by their meaning, reasoning is kept
    torchrun: ClassVar[bool] = False

    algorithm: Literal["data"] = "data"
    """Name of the stage."""
    purpose: Purpose
    """What the rows are used for."""
    model: Digest = job_input()
    """Model whose tokenizer and chat template encode the rows."""
    fingerprint: str = ""
    """Fingerprint of the source's contents, so that a changed file is prepared again."""

    def current_version(self) -> int:
        """One more for pretraining, where long documents are cut instead of dropped."""
        return self.version + (self.purpose == "pretrain")

    def key_settings(self) -> dict[str, Any]:
        """The settings in the key; an empty `ignore_columns` or `curriculum` is left out."""
        settings = super().key_settings()
        for later in ("ignore_columns", "curriculum"):
            if not settings[later]:
                del settings[later]
        return settings


class MixedData(Share):
    """A prepared source of a mixture."""

    name: Slug
    """Name of the source."""
    data: Digest
    """Its data set."""
    deduplicate: bool = True
    """Drop rows that an earlier source has."""


class MixJob(EpochSettings, BaseJob):
    """Mixes data sets that are prepared into one, with the plan of its epochs."""

    module: ClassVar[str] = "rlhf_core.stages.mix"
    kind: ClassVar[str] = "dataset"
    torchrun: ClassVar[bool] = False
    # The rows have their order from the sources, and the epochs from the stage that trains.
    excluded_from_key: ClassVar[frozenset[str]] = BaseJob.excluded_from_key | {"seed"}

    algorithm: Literal["mix"] = "mix"
    """Name of the stage."""
    purpose: Purpose
    """What the rows are used for."""
    model: Digest = job_input()
    """Model whose tokenizer encoded the rows."""
    mix: tuple[MixedData, ...]
    """The sources."""

    def inputs(self) -> dict[str, str]:
        """The data sets are inputs by the names of their sources."""
        return super().inputs() | {f"data-{part.name}": part.data for part in self.mix}


class TrainingData(BaseJob):
    """The data sets that a run trained on: a measurement looks for its prompts in them."""

    pretrain_data: Digest | None = job_input("pretrain", default=None)
    """Texts of the stage pretrain."""
    sft_data: Digest | None = job_input("sft", default=None)
    """Demonstrations; the evaluation also measures the loss on their held-out rows."""
    preference_data: Digest | None = job_input("preference", default=None)
    """Preference pairs."""
    unpaired_data: Digest | None = job_input("unpaired", default=None)
    """Labelled replies."""
    ptx_data: Digest | None = job_input("ptx", default=None)
    """Data mixed into online RL."""

    def key_settings(self) -> dict[str, Any]:
        """Data sets that there are not have no place in the key."""
        names = {*TrainingData.roles(), "prompts"}
        settings = super().key_settings()
        return {k: v for k, v in settings.items() if k not in names or v is not None}

    def training_data(self) -> dict[str, str]:
        """Role of each data set, also of `prompts`, if the job has it -> its digest; each once."""
        found: dict[str, str] = {}
        for field, role in {**TrainingData.roles(), "prompts": "prompts"}.items():
            digest = getattr(self, field, None)
            if digest is not None and digest not in found.values():
                found[role] = digest
        return found


class LabelJob(SampledPreferences, EnsembleJob):
    """Samples replies from a model and labels pairs of them."""

    module: ClassVar[str] = "rlhf_core.stages.label"
    kind: ClassVar[str] = "dataset"

    algorithm: Literal["label"] = "label"
    """Name of the stage."""
    model: Digest = job_input()
    """Model to sample from."""
    prompts: Digest = job_input()
    """Data set of purpose prompts."""
    reward_model: Digest | None = job_input(default=None)
    """Reward model, when it is the labeller."""
    margins: bool = False
    """Keep the difference of the labeller's scores as the pair's margin, for reward.margin_coef."""
    resources: Resources = Resources()
    """Placement of the job."""

    def key_settings(self) -> dict[str, Any]:
        """Leaves out margins and judge where there are none, so that older results keep their keys,
        and how a judge is asked."""
        settings = super().key_settings()
        if not self.margins:
            del settings["margins"]
        if self.judge is None:
            del settings["judge"]
        else:
            settings["judge"] = without_asking(settings["judge"])
        return settings

    @model_validator(mode="after")
    def _margins_are_scores(self) -> Self:
        if self.margins and isinstance(self.judge, EndpointJudgeSettings):
            raise ValueError(
                "margins is set, but a judge that compares gives no scores; use a judge of type "
                "rubric, or clear margins (reward.margin_coef)"
            )
        return self
