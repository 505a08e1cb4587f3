"""The base of all settings and jobs.

Units: lengths in tokens, learning rates per optimizer step, KL in nats, times in seconds.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.fields import FieldInfo

LARGEST = 2**31 - 1  # counts and seconds: what every library below can hold
PositiveInt = Annotated[int, Field(ge=1, le=LARGEST)]
Seed = Annotated[int, Field(ge=0, le=LARGEST)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Slug = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]

Strategy = Literal["ddp", "zero1", "zero2", "zero2_cpu", "fsdp2"]
Precision = Literal["fp32", "bf16", "fp16"]
Quantization = Literal["nf4"]
Format = Literal[
    "auto", "alpaca", "messages", "sharegpt", "prompt_completion", "hh", "preference",
    "implicit_prompt", "unpaired", "prompt", "text",
]  # fmt: skip
Purpose = Literal["sft", "preference", "unpaired", "prompts", "pretrain"]


class RenamedSetting(FutureWarning):
    """A setting was given by its old name."""


class Settings(BaseModel):
    """Base of all settings: frozen, no unknown names, described by the docstrings of its fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(),
        allow_inf_nan=False,  # JSON has neither, so a job file could not hold them
    )  # fmt: skip

    renamed: ClassVar[Mapping[str, str]] = {}  # old name of a setting -> its name today

    @model_validator(mode="before")
    @classmethod
    def _accept_old_names(cls, data: Any) -> Any:
        """Settings under the name that they had one version ago are taken, with a warning."""
        if not isinstance(data, dict):
            return data
        for old, new in cls.renamed.items():
            if old not in data:
                continue
            if new in data:
                raise ValueError(f"{old} is the old name of {new}, and both are set: remove {old}")
            data = {new if name == old else name: value for name, value in data.items()}
            warnings.warn(
                f"the setting {old} is now called {new}; the old name is accepted in this version "
                "and will be refused in the next: rename it",
                RenamedSetting,
                stacklevel=2,
            )
        return data

    @field_validator("*")
    @classmethod
    def _whole_characters(cls, value: Any) -> Any:
        """Refuse texts that a job file could not hold."""
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


class Resources(Settings):
    """Where and how a stage runs. These settings change neither its result nor its stage key."""

    renamed: ClassVar[Mapping[str, str]] = {
        "stop_seconds": "stop_timeout",
        "store_patience": "store_timeout",
    }

    nodes: PositiveInt = 1
    """Number of machines. More than one needs a launcher of a cluster."""
    ranks: PositiveInt = 1
    """Number of training processes on each node, one per GPU. On a CPU they share the cores."""
    strategy: Strategy = "ddp"
    """How model and optimizer are spread over the ranks. ddp: whole on each rank. zero1, zero2,
    zero2_cpu: ColossalAI's ZeRO, which shards the optimizer, and gradients from zero2 on. fsdp2:
    torch's fully_shard, which shards the weights as well."""
    micro_batch_size: PositiveInt = 8
    """Rows per rank in one forward and backward pass, counted at the batch's greatest length. Of
    shorter rows a pass takes as many as have no more tokens. A row is a sequence, or a pair."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the ranks. auto: GPUs if there are any, else the CPU."""
    threads: PositiveInt | None = None
    """CPU threads per rank. Empty: the machine's cores divided by its ranks."""
    fast_paths: bool = True
    """Use this project's faster equivalents of transformers' code (rows without padding, shared
    layers, decoding). false runs transformers' own code everywhere: to find out whether a fault
    comes from them."""
    checkpoint_every: PositiveInt = 50
    """Optimizer steps between two checkpoints; rollouts in online RL."""
    keep_checkpoints: PositiveInt = 2
    """How many of the newest checkpoints are kept while the stage runs."""
    collective_timeout: Annotated[int, Field(ge=10, le=LARGEST)] = 1800
    """Seconds that a rank waits for the others. Then the job ends with every rank's Python stack in
    its log, and is retried from its last checkpoint."""
    stop_timeout: Annotated[int, Field(ge=1, le=27)] = 15
    """Seconds that ranks have after SIGTERM (a cancelled run, a drained node) to finish their step
    and store a checkpoint. torchrun kills them after 30."""
    store_timeout: Annotated[int, Field(ge=0, le=LARGEST)] = 900
    """Seconds that a finished stage waits for an unreachable store. Uploads of checkpoints are
    retried for as long as training goes on."""

    @property
    def world_size(self) -> int:
        """Ranks of all nodes."""
        return self.nodes * self.ranks

    @field_validator("strategy", mode="before")
    @classmethod
    def _gemini_is_gone(cls, value: Any) -> Any:
        if value == "gemini":
            raise ValueError(
                "gemini was removed, because ColossalAI's Gemini refuses the optimizer of this "
                "project; use fsdp2, which also shards weights, gradients and optimizer"
            )
        return value


class BaseJob(Settings):
    """A stage that can be run: settings, and inputs by digest.

    Raise `version` when the code computes something else, so that older results are not reused.
    `module` is the module whose `run(job, context)` does the work.
    """

    version: ClassVar[int] = 1
    module: ClassVar[str]
    kind: ClassVar[str]  # of the artifact that the job publishes
    torchrun: ClassVar[bool] = True  # False: one plain process, no process group
    excluded_from_key: ClassVar[frozenset[str]] = frozenset(
        {"resources", "trust_remote_code"}
    )  # of the key

    seed: Seed = 0
    """Seed of all random choices of the stage."""
    trust_remote_code: bool = False
    """Allow Python code that comes with the model, as model.trust_remote_code says."""

    def placement(self) -> Resources:
        """Where the job runs; one rank if it has no field `resources`."""
        resources = getattr(self, "resources", None)
        return resources if isinstance(resources, Resources) else Resources()

    @property
    def samplers(self) -> int:
        """GPUs of the first node for processes that sample beside its ranks."""
        return 0

    def current_version(self) -> int:
        """The version in the key. A job class may return another one for some settings."""
        return self.version

    def key_settings(self) -> dict[str, Any]:
        """The part of the job that its key covers: all settings except placement and trust.

        `on_nonfinite` counts when it is a factor, because the result may then differ.
        """
        settings = self.model_dump(mode="json", exclude=set(self.excluded_from_key))
        if settings.get("on_nonfinite") == "fail":
            del settings["on_nonfinite"]
        return settings

    def key(self) -> str:
        """The stage key: sha256 of version and `key_settings`."""
        payload = {"version": self.current_version(), "job": self.key_settings()}
        text = json.dumps(payload, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def fail_fast_variant(self) -> Self:
        """The same job, failing at the first non-finite loss; equal to this one until then."""
        if "on_nonfinite" not in type(self).model_fields:
            return self
        return self.model_copy(update={"on_nonfinite": "fail"})

    def inputs(self) -> dict[str, str]:
        """Input name -> artifact digest, of the inputs that are set."""
        return {
            name: value
            for name, field in type(self).model_fields.items()
            if "input" in _extra(field) and isinstance(value := getattr(self, name), str)
        }

    @classmethod
    def roles(cls) -> dict[str, str]:
        """Field of each input -> its role, see `job_input`."""
        fields = cls.model_fields.items()
        return {name: str(_extra(f)["input"] or name) for name, f in fields if "input" in _extra(f)}


def job_input(role: str = "", **kwargs: Any) -> Any:
    """A field that names an artifact by its digest.

    Args:
        role: what the pipeline passes: "model" (the newest language model), "reward_model", "ptx",
            or a data set by its purpose. Empty: the field's name is the role.
    """
    return Field(json_schema_extra={"input": role}, **kwargs)


def _extra(field: FieldInfo) -> dict[str, Any]:
    extra = field.json_schema_extra
    return extra if isinstance(extra, dict) else {}
