"""Jobs: the one contract between orchestrator and training. No torch in here.

A *settings* class describes what a person chooses; a *job* is the same settings with every input
named by its artifact digest. Each algorithm has one frozen job class; `Job` is the plain union of
them (`Field(discriminator=...)` breaks Prefect's form). A job file is `job.model_dump_json()`.

Units: lengths in tokens, learning rates per optimizer step, KL in nats, times in seconds.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, ClassVar, Literal, Self, cast, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    field_validator,
    model_validator,
)

LARGEST = 2**31 - 1  # counts and seconds: what every library below can hold
PositiveInt = Annotated[int, Field(ge=1, le=LARGEST)]
Seed = Annotated[int, Field(ge=0, le=LARGEST)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Slug = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]

Strategy = Literal["ddp", "zero1", "zero2", "zero2_cpu", "gemini"]
Precision = Literal["fp32", "bf16", "fp16"]
Format = Literal[
    "auto", "alpaca", "messages", "sharegpt", "prompt_completion", "hh", "preference", "prompt",
    "text",
]  # fmt: skip
Purpose = Literal["sft", "preference", "prompts", "pretrain"]


class Settings(BaseModel):
    """Base of all settings: frozen, strict about names, described by their docstrings."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(),
        allow_inf_nan=False,  # JSON has neither: what was written down would read as nothing
    )  # fmt: skip

    @field_validator("*")
    @classmethod
    def _whole_characters(cls, value: Any) -> Any:
        """Texts that could not be written into a job file are refused."""
        texts = value.items() if isinstance(value, dict) else [value]
        try:
            for text in texts:
                "".join([text] if isinstance(text, str) else _strings(text)).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text holds half a character (a lone surrogate) at position "
                f"{error.start + 1}; write the whole character"
            ) from None
        return value


def _strings(value: Any) -> list[str]:
    return [part for part in value if isinstance(part, str)] if isinstance(value, tuple) else []


# --------------------------------------------------------------------------- placement


class Resources(Settings):
    """Where and how a stage runs. None of it changes what the stage computes or its stage key."""

    ranks: PositiveInt = 1
    """Training processes (one GPU each, or one share of the CPU cores)."""
    strategy: Strategy = "ddp"
    """How model and optimizer are spread over the ranks (ColossalAI Booster plugin)."""
    micro_batch_size: PositiveInt = 8
    """Sequences (pairs for the reward model) per rank in one forward and backward pass; the
    accumulation follows from batch_size / (ranks x micro_batch_size)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the ranks; auto takes the GPUs if there are any."""
    threads: PositiveInt | None = None
    """CPU threads per rank; empty: the machine's cores divided by the ranks."""
    checkpoint_every: PositiveInt = 50
    """Optimizer steps (rollouts for PPO) between two checkpoints."""
    keep_checkpoints: PositiveInt = 2
    """Number of newest checkpoints that are kept while the stage runs."""
    collective_timeout: Annotated[int, Field(ge=10, le=LARGEST)] = 1800
    """Seconds after which a rank that waits for another one gives up; the job then ends with every
    rank's Python stack in its log, and is tried again from its last checkpoint."""
    stop_seconds: Annotated[int, Field(ge=1, le=27)] = 15
    """Seconds that ranks have after SIGTERM (a cancelled run, a drained node) to finish their step
    and store a checkpoint; torchrun kills after 30."""
    store_patience: Annotated[int, Field(ge=0, le=LARGEST)] = 900
    """Seconds for which a finished stage waits for a store that is away before it gives up;
    checkpoints are tried again for as long as training goes on."""


class LocalLauncher(Settings):
    """Runs a stage as torchrun on this machine, as a child of the flow's process."""

    type: Literal["local"] = "local"
    """Launcher kind."""


class WorkPoolLauncher(Settings):
    """Runs a stage as a flow run of its own on a GPU work pool; they share the store, no disk."""

    type: Literal["work_pool"] = "work_pool"
    """Launcher kind."""
    deployment: str = "rlhf-job/gpu-job"
    """Deployment of the flow that runs one job, as flow/deployment."""
    queue_timeout: Annotated[int, Field(ge=10, le=LARGEST)] = 86_400
    """Seconds that a stage may wait for a free slot of the pool before it fails."""


Launcher = LocalLauncher | WorkPoolLauncher


# --------------------------------------------------------------------------- model and data


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
    """Hugging Face dataset id, path or s3:// URL of .json, .jsonl, .jsonl.gz, .parquet or .csv
    files (a folder or a pattern too), or builtin:chatterbot."""
    format: Format = "auto"
    """Layout of a row; auto looks at the columns of the first row."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Renames columns: name that the format expects -> name in the file."""
    subset: str | None = None
    """Configuration of a hub dataset, or language of a built-in set (english, chinese)."""
    split: str = "train"
    """Split of a hub dataset."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    max_samples: PositiveInt | None = None
    """Rows kept at most, chosen by a seeded shuffle after filtering; empty: all."""
    max_length: PositiveInt = 512
    """Longest sequence, prompt and reply together; longer rows are dropped and counted."""
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
    labeller: Literal["vader"] = "vader"
    """Who compares two replies; vader: the sentiment lexicon (the more positive reply wins)."""
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

    sft: DataSettings = DataSettings()
    """Demonstrations for supervised fine-tuning."""
    preference: SampledPreferences | DataSettings = SampledPreferences()
    """Pairs for the reward model: a ready data set, or sampled from the SFT model and labelled."""
    prompts: DataSettings = DataSettings()
    """Prompts for PPO and for the evaluation."""
    ptx: DataSettings | None = None
    """Data mixed into PPO when ppo.ptx_coef is above 0; empty: the SFT data."""


# --------------------------------------------------------------------------- training


class LoRA(Settings):
    """Low-rank adapters (peft), merged into the weights that are published."""

    rank: PositiveInt = 8
    """Rank of the update matrices."""
    alpha: Annotated[float, Field(gt=0.0)] = 16.0
    """Scale: the update is multiplied by alpha / rank."""
    targets: tuple[str, ...] | None = None
    """Names of the linear layers that get an adapter; empty: all linear layers but the head."""


class TrainSettings(Settings):
    """What all training stages share."""

    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-5
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up (cosine and linear end at 0)."""
    warmup_fraction: Fraction = 0.03
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """AdamW weight decay (not on biases and norms)."""
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0
    """The gradient's norm is clipped to this."""
    precision: Precision = "bf16"
    """fp32, bf16 or fp16 (GPU only) arithmetic; master weights and optimizer are fp32."""
    on_nonfinite: Literal["fail"] | Annotated[float, Field(gt=0.0, lt=1.0)] = "fail"
    """What a NaN or infinite loss or gradient does: fail, or go on from the last checkpoint with
    the learning rate times this factor (twice at most; the result says so)."""
    lora: LoRA | None = None
    """Train low-rank adapters instead of the weights."""
    trainable_layers: PositiveInt | None = None
    """Train only the top n transformer layers, the last norm and the heads; empty: everything."""
    resources: Resources | None = None
    """Placement of this stage; empty: the pipeline's."""

    @model_validator(mode="after")
    def _one_way_to_freeze(self) -> Self:
        if self.lora is not None and self.trainable_layers is not None:
            raise ValueError(
                "lora and trainable_layers are both set; they exclude each other: clear one"
            )
        return self


class SFTSettings(TrainSettings):
    """Supervised fine-tuning: cross-entropy on the assistant's tokens."""

    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 2e-5
    """Peak learning rate."""
    epochs: PositiveInt = 1
    """Passes over the training rows."""
    max_steps: PositiveInt | None = None
    """Optimizer steps at most; empty: as many as the epochs need."""
    batch_size: PositiveInt = 32
    """Sequences per optimizer step over all ranks and micro-batches."""


class RewardSettings(TrainSettings):
    """Reward model: a scalar head trained on preference pairs."""

    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-5
    """Peak learning rate."""
    epochs: PositiveInt = 1
    """Passes over the training pairs; more than one overfits quickly."""
    max_steps: PositiveInt | None = None
    """Optimizer steps at most; empty: as many as the epochs need."""
    batch_size: PositiveInt = 32
    """Pairs per optimizer step over all ranks and micro-batches."""
    loss: Literal["log_sig", "log_exp"] = "log_sig"
    """-log sigmoid(c - r) or log(1 + exp(r - c)): the same function under its two names."""
    pooling: Literal["last", "mean"] = "last"
    """What the head reads: the hidden state of the last token, or the mean over all tokens so far.
    The mean needs far fewer pairs when replies are short or cut."""
    head: Literal["random", "probe"] = "random"
    """Start of the head: random, or a logistic regression on the untrained model's states whose
    penalty is cross-validated over prompts (LP-FT), which needs far fewer pairs."""
    normalization_prompts: PositiveInt = 64
    """Training prompts whose SFT replies set the scores' mean to 0 and deviation to 1."""
    max_new_tokens: PositiveInt = 64
    """Longest of those SFT replies when they have to be sampled."""


class PPOSettings(TrainSettings):
    """Proximal policy optimisation against the reward model."""

    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-6
    """Peak learning rate of the policy."""
    critic_learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Peak learning rate of the critic; empty: the policy's times 5."""
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    """Course of the learning rate after the warm-up (cosine and linear end at 0)."""
    steps: PositiveInt = 100
    """Rollouts."""
    batch_size: PositiveInt = 64
    """Prompts per rollout over all ranks; one reply each."""
    ppo_epochs: PositiveInt = 4
    """Passes over each rollout."""
    minibatches: PositiveInt = 1
    """Optimizer steps per pass."""
    max_new_tokens: PositiveInt = 128
    """Longest reply."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Sampling temperature; log-probabilities are taken at it."""
    kl_coef: Annotated[float, Field(ge=0.0)] = 0.05
    """Weight of the per-token KL penalty to the SFT model."""
    clip_range: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Bound of the probability ratio's deviation from 1."""
    value_clip_range: Annotated[float, Field(gt=0.0)] = 0.2
    """Bound of the value's change from the rollout's value."""
    value_coef: Annotated[float, Field(ge=0.0)] = 0.1
    """Weight of the value loss."""
    gamma: Fraction = 1.0
    """Discount per token."""
    gae_lambda: Fraction = 0.95
    """GAE's lambda."""
    missing_eos_penalty: Annotated[float, Field(ge=0.0)] = 1.0
    """Taken off the score of a reply that was cut at max_new_tokens."""
    ptx_coef: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the language-modelling loss mixed in (PPO-ptx); 0 switches it off."""
    max_kl: Annotated[float, Field(gt=0.0)] = 100.0
    """The stage fails when the KL to the SFT model (nats per reply, mean) exceeds this."""


class EvaluateSettings(Settings):
    """Comparison of base, SFT and PPO models on held-out prompts."""

    max_prompts: PositiveInt = 128
    """Held-out prompts at most."""
    max_new_tokens: PositiveInt | None = None
    """Longest reply; empty: ppo.max_new_tokens."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Sampling temperature of the replies."""
    judge: Literal["none", "vader"] = "none"
    """Gold judge that training never sees, reported beside the reward model."""
    samples: PositiveInt = 8
    """Prompts shown with each model's reply in the report."""
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


class PipelineConfig(Settings):
    """Everything a run of the pipeline depends on. The defaults run on an empty machine."""

    preset: Literal["none", "smoke", "demo", "bloom-560m", "llama-7b"] = "none"
    """Settings to start from; what is set below to something else than its default lies over
    them."""
    name: Slug = "rlhf"
    """Name of the run, shown in lists."""
    seed: Seed = 0
    """Seed of every shuffle, split, initialisation and sample."""
    store: str | None = None
    """URL of the artifact store (file:// or s3://); empty: $RLHF_STORE, else .rlhf/store here."""
    model: ModelSettings = ModelSettings()
    """Base model."""
    data: DataConfig = DataConfig()
    """Data sets."""
    resources: Resources = Resources()
    """Placement of every stage that has none of its own."""
    sft: SFTSettings = SFTSettings()
    """Supervised fine-tuning."""
    reward: RewardSettings = RewardSettings()
    """Reward model."""
    ppo: PPOSettings = PPOSettings()
    """Reinforcement learning."""
    evaluate: EvaluateSettings = EvaluateSettings()
    """Evaluation."""
    publish: PublishSettings = PublishSettings()
    """Publishing."""
    launcher: Launcher = LocalLauncher()
    """How stages are started."""


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


# --------------------------------------------------------------------------- jobs


class BaseJob(Settings):
    """A stage that can be run: settings plus inputs by digest.

    `version` is raised whenever the algorithm's code starts to compute something else, so that
    older results are not reused; `module` is the module whose `run(job, context)` does the work.
    """

    version: ClassVar[int] = 1
    module: ClassVar[str]
    kind: ClassVar[str]  # of the artifact that the job publishes
    torchrun: ClassVar[bool] = True  # False: one plain process, no process group

    seed: Seed = 0
    """Seed of every random choice of the stage."""
    trust_remote_code: bool = False
    """Run Python code that came with the model, as model.trust_remote_code says."""

    def placement(self) -> Resources:
        """Where the job runs: one rank if the job has no say in it."""
        resources = getattr(self, "resources", None)
        return resources if isinstance(resources, Resources) else Resources()

    def key(self) -> str:
        """Stage key: sha256 over algorithm, version and all settings but placement and trust.

        `on_nonfinite` counts when it is a factor: the result may then be another one.
        """
        apart = {"resources", "trust_remote_code"}
        if isinstance(self, ModelSettings):
            apart.remove("trust_remote_code")  # an import with and without code are two things
        settings = self.model_dump(mode="json", exclude=apart)
        if settings.get("on_nonfinite") == "fail":
            del settings["on_nonfinite"]
        payload = {"version": self.version, "job": settings}
        text = json.dumps(payload, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def cautious(self) -> Self:
        """The same job, but failing at a non-finite loss: equal to this one up to the first."""
        if "on_nonfinite" not in type(self).model_fields:
            return self
        return self.model_copy(update={"on_nonfinite": "fail"})

    def inputs(self) -> dict[str, str]:
        """Input name -> artifact digest, for every input that is given."""
        return {
            name: value
            for name, field in type(self).model_fields.items()
            if (field.json_schema_extra or {}) == {"input": True}
            and isinstance(value := getattr(self, name), str)
        }


def _input(**kwargs: Any) -> Any:
    return Field(json_schema_extra={"input": True}, **kwargs)


class ImportModelJob(ModelSettings, BaseJob):
    """Brings a base model into the store as safetensors, with tokenizer and chat template."""

    module: ClassVar[str] = "rlhf_core.import_model"
    kind: ClassVar[str] = "model"
    torchrun: ClassVar[bool] = False

    algorithm: Literal["import_model"] = "import_model"
    """Job kind."""
    fingerprint: str = ""
    """Identity of the source's contents, so that a changed folder is imported again."""


class DataJob(DataSettings, BaseJob):
    """Reads, checks, splits and tokenises one data set."""

    module: ClassVar[str] = "rlhf_core.data.prepare"
    kind: ClassVar[str] = "dataset"
    torchrun: ClassVar[bool] = False

    algorithm: Literal["data"] = "data"
    """Job kind."""
    purpose: Purpose
    """What the rows are for."""
    model: Digest = _input()
    """Model whose tokenizer and chat template are used."""
    fingerprint: str = ""
    """Identity of the source's contents, so that a changed file is prepared again."""


class SFTJob(SFTSettings, BaseJob):
    """Supervised fine-tuning."""

    module: ClassVar[str] = "rlhf_core.train.sft"
    kind: ClassVar[str] = "model"

    algorithm: Literal["sft"] = "sft"
    """Job kind."""
    model: Digest = _input()
    """Base model."""
    data: Digest = _input()
    """Data set of purpose sft."""
    resources: Resources = Resources()
    """Placement."""


class LabelJob(SampledPreferences, BaseJob):
    """Samples replies from the SFT model and compares them."""

    module: ClassVar[str] = "rlhf_core.label"
    kind: ClassVar[str] = "dataset"

    algorithm: Literal["label"] = "label"
    """Job kind."""
    model: Digest = _input()
    """SFT model."""
    prompts: Digest = _input()
    """Data set of purpose prompts."""
    resources: Resources = Resources()
    """Placement."""


class RewardJob(RewardSettings, BaseJob):
    """Reward model training."""

    module: ClassVar[str] = "rlhf_core.train.reward"
    kind: ClassVar[str] = "reward_model"

    algorithm: Literal["reward"] = "reward"
    """Job kind."""
    model: Digest = _input()
    """SFT model: the reward model starts from its weights."""
    data: Digest = _input()
    """Data set of purpose preference."""
    resources: Resources = Resources()
    """Placement."""


class PPOJob(PPOSettings, BaseJob):
    """PPO."""

    module: ClassVar[str] = "rlhf_core.train.ppo"
    kind: ClassVar[str] = "model"

    algorithm: Literal["ppo"] = "ppo"
    """Job kind."""
    model: Digest = _input()
    """SFT model: start of the policy, and the reference."""
    reward_model: Digest = _input()
    """Reward model, and start of the critic."""
    prompts: Digest = _input()
    """Data set of purpose prompts."""
    ptx: Digest | None = _input(default=None)
    """Data set of purpose sft or pretrain that is mixed in when ptx_coef is above 0."""
    resources: Resources = Resources()
    """Placement."""


class EvaluateJob(EvaluateSettings, BaseJob):
    """Evaluation on held-out data."""

    module: ClassVar[str] = "rlhf_core.evaluate"
    kind: ClassVar[str] = "evaluation"

    algorithm: Literal["evaluate"] = "evaluate"
    """Job kind."""
    max_new_tokens: PositiveInt = 128
    """Longest reply."""
    base: Digest = _input()
    """Base model."""
    sft: Digest = _input()
    """SFT model."""
    policy: Digest = _input()
    """Aligned model."""
    reward_model: Digest = _input()
    """Reward model."""
    prompts: Digest = _input()
    """Data set of purpose prompts."""
    sft_data: Digest = _input()
    """Data set of purpose sft, for the held-out loss."""
    resources: Resources = Resources()
    """Placement."""


Job = ImportModelJob | DataJob | SFTJob | LabelJob | RewardJob | PPOJob | EvaluateJob
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
