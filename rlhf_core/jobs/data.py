"""The base model and the data sets."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rlhf_core.jobs.base import (
    LARGEST,
    BaseJob,
    Digest,
    Format,
    Fraction,
    PositiveInt,
    Purpose,
    Resources,
    Settings,
    job_input,
)


class ModelSettings(Settings):
    """The base language model."""

    source: str = "builtin:smollm2-135m-instruct"
    """Hugging Face id, local folder, artifact:DIGEST, builtin:smollm2-135m-instruct, or
    random:NAME with llama, qwen2, gpt2, opt or bloom (a tiny untrained model for tests)."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    chat_template: Literal["auto", "chatml", "llama3", "alpaca", "vicuna", "plain"] = "auto"
    """auto: the tokenizer's own chat template, else chatml; or one of the built-in ones."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class DataSettings(Settings):
    """A data set: where it is, how to read it, what to keep."""

    source: str = "builtin:chatterbot"
    """Hugging Face dataset id, path or s3:// URL of .json, .jsonl, .jsonl.gz, .parquet, .csv, .txt
    or .md files (a folder or a pattern too), builtin:chatterbot,
    reasoning-gym:TASK?size=500&seed=0, or what people said on the page of `rlhf playground`, kept
    in the run's store: playground-votes, the replies that they preferred, or playground-thumbs,
    single replies and whether they were good."""
    format: Format = "auto"
    """Layout of a row; auto looks at the columns of the first row."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Renames columns: name that the format expects -> name in the file. Prompts can have two more,
    for rewards: answer (text or number) and extra (JSON); they are kept only if named here."""
    subset: str | None = None
    """Configuration of a hub dataset, or language of a built-in set (english, chinese)."""
    split: str = "train"
    """Split of a hub dataset."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    max_samples: PositiveInt | None = None
    """Rows kept at most, chosen by a seeded shuffle after filtering; empty: all."""
    max_length: PositiveInt = 512
    """Longest sequence, prompt and reply together; longer rows are dropped and counted, but for
    pretraining they are cut into pieces."""
    max_prompt_length: PositiveInt | None = None
    """Longest prompt; longer ones are dropped and counted. Empty: max_length."""
    heldout_fraction: Fraction = 0.1
    """Share of the prompts that is held out; a prompt is on the same side in every data set."""
    deduplicate: bool = True
    """Drop rows whose text occurred before."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a row that cannot be used does: end with an error, or be counted in the data card."""
    system: str | None = None
    """System message put before conversations that have none."""


class SampledPreferences(Settings):
    """Preference pairs made as InstructGPT made them: sampled from the SFT model, then compared."""

    source: Literal["sampled"] = "sampled"
    """Replies are sampled from the SFT model on the data set `prompts`."""
    labeller: Literal["vader", "reward_model"] = "vader"
    """Who compares two replies; vader: the sentiment lexicon (the more positive reply wins);
    reward_model: the pipeline's reward model."""
    max_prompts: PositiveInt = 256
    """Training prompts at most."""
    max_heldout_prompts: PositiveInt = 64
    """Held-out prompts at most; each gives one pair, its best and worst reply."""
    samples_per_prompt: Annotated[int, Field(ge=2, le=LARGEST)] = 4
    """Replies sampled for each prompt; all comparisons between a training prompt's replies become
    pairs, as in InstructGPT."""
    max_new_tokens: PositiveInt = 64
    """Longest reply."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Sampling temperature."""
    min_margin: Annotated[float, Field(ge=0.0)] = 0.05
    """Pairs whose labeller scores differ by less are dropped and counted."""
    resources: Resources | None = None
    """Placement of the label stage; empty: the pipeline's."""


class DataConfig(Settings):
    """The data sets of the pipeline."""

    pretrain: DataSettings | None = None
    """Plain text for pretraining; needed where stages has pretrain."""
    sft: DataSettings = DataSettings()
    """Demonstrations for supervised fine-tuning."""
    preference: SampledPreferences | DataSettings = SampledPreferences()
    """Pairs for the reward model: a ready data set, or sampled from the SFT model and labelled."""
    unpaired: DataSettings | None = None
    """Single replies with a verdict (format unpaired), for KTO; empty: the pairs, each split into
    a desirable and an undesirable reply."""
    prompts: DataSettings = DataSettings()
    """Prompts for PPO and for the evaluation."""
    rounds: SampledPreferences = SampledPreferences(labeller="reward_model")
    """Pairs of each round of iterative preference optimisation (rounds above 1): sampled from the
    newest policy."""
    ptx: DataSettings | None = None
    """Data mixed into PPO when ppo.ptx_coef is above 0; empty: the SFT data."""


class ImportModelJob(ModelSettings, BaseJob):
    """Brings a base model into the store as safetensors, with tokenizer and chat template."""

    module: ClassVar[str] = "rlhf_core.stages.import_model"
    kind: ClassVar[str] = "model"
    torchrun: ClassVar[bool] = False
    excluded_from_key: ClassVar[frozenset[str]] = (
        frozenset()
    )  # with and without code are two things

    algorithm: Literal["import_model"] = "import_model"
    """Job kind."""
    fingerprint: str = ""
    """Identity of the source's contents, so that a changed folder is imported again."""


class ImportRewardJob(BaseJob):
    """Brings a reward model that is there already into the store."""

    module: ClassVar[str] = "rlhf_core.stages.import_reward"
    kind: ClassVar[str] = "reward_model"
    torchrun: ClassVar[bool] = False
    excluded_from_key: ClassVar[frozenset[str]] = frozenset()

    algorithm: Literal["import_reward"] = "import_reward"
    """Job kind."""
    source: str
    """artifact:DIGEST, local folder or Hugging Face id."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    model: Digest = job_input()
    """Language model whose vocabulary it must share."""
    fingerprint: str = ""
    """Identity of the source's contents, so that a changed folder is imported again."""


class DataJob(DataSettings, BaseJob):
    """Reads, checks, splits and tokenises one data set."""

    module: ClassVar[str] = "rlhf_core.stages.prepare_data"
    kind: ClassVar[str] = "dataset"
    torchrun: ClassVar[bool] = False

    algorithm: Literal["data"] = "data"
    """Job kind."""
    purpose: Purpose
    """What the rows are for."""
    model: Digest = job_input()
    """Model whose tokenizer and chat template are used."""
    fingerprint: str = ""
    """Identity of the source's contents, so that a changed file is prepared again."""

    def current_version(self) -> int:
        """Long documents are cut instead of dropped since version 2; other purposes stayed."""
        return 2 if self.purpose == "pretrain" else self.version


class LabelJob(SampledPreferences, BaseJob):
    """Samples replies from a model and compares them."""

    module: ClassVar[str] = "rlhf_core.stages.label"
    kind: ClassVar[str] = "dataset"

    algorithm: Literal["label"] = "label"
    """Job kind."""
    model: Digest = job_input()
    """Model that is sampled from."""
    prompts: Digest = job_input()
    """Data set of purpose prompts."""
    reward_model: Digest | None = job_input(default=None)
    """Reward model, where that is the labeller."""
    resources: Resources = Resources()
    """Placement."""
