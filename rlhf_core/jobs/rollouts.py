"""Rollout engines: what samples the replies in online reinforcement learning."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rlhf_core.jobs.base import PositiveInt, Settings


class RolloutCorrection(Settings):
    """Importance weights for what sampler and trainer compute differently: the surrogate of a token
    is multiplied by the trainer's probability over the sampler's, within bounds (truncated
    importance sampling; TIS, IcePop and MIS)."""

    level: Literal["token", "sequence"] | None = None
    """token: one weight per token, biased and stable. sequence: one weight per reply, the product
    over its tokens, unbiased but for the bounds; in long replies small differences add up. Empty:
    token; for rloo, whose action is a whole reply, sequence."""
    mode: Literal["truncate", "mask"] = "truncate"
    """What happens to weights beyond the bounds. truncate: they are set to the bound. mask: they
    become 0, so that the token or reply is not learned from."""
    max_weight: Annotated[float, Field(ge=1.0)] | None = 2.0
    """Upper bound of the weights. Empty: none."""
    min_weight: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """Lower bound of the weights. Empty: none."""

    @model_validator(mode="after")
    def _masks_something(self) -> Self:
        if self.mode == "mask" and self.max_weight is None and self.min_weight is None:
            raise ValueError(
                "mode is mask, but max_weight and min_weight are empty, so nothing would be "
                "masked; give a bound, such as max_weight 2, or set mode to truncate"
            )
        return self


class Placement(Settings):
    """Where replies are sampled, and by how old a policy: settings of every engine."""

    excluded_from_key: ClassVar[frozenset[str]] = frozenset({"placement", "ranks"})
    later: ClassVar[tuple[str, ...]] = ("max_staleness", "segments")  # see `key_settings`

    placement: Literal["colocated", "separate"] = "colocated"
    """Where replies are sampled. colocated: in the training processes, in turns with the updates.
    separate: in processes of their own on the first node, and beside the updates where
    max_staleness is above 0. Not part of the stage key."""
    ranks: PositiveInt = 1
    """Sampling processes where placement is separate. On GPUs each takes one (by vLLM as many as
    tensor_parallel says) beyond those of the first node's training ranks; on a CPU they share the
    cores with them. Not part of the stage key."""
    max_staleness: Annotated[int, Field(ge=0, le=64)] = 0
    """How many steps older than the policy that is trained the weights may be that sample a reply.
    The replies of a step are always begun with the weights of exactly so many steps before it, so
    results can be repeated. 0: with the newest weights, and samplers and trainers take turns."""
    segments: Annotated[int, Field(ge=1, le=65)] = 1
    """Parts in which a reply is sampled, each of max_new_tokens / segments tokens at most. Each
    part comes from weights that are one step newer: unfinished replies are carried over the
    update and decoded together with the next step's. At most max_staleness + 1."""

    correction: RolloutCorrection | None = None
    """Importance weights, see each engine."""

    @property
    def correction_in_force(self) -> RolloutCorrection | None:
        """The importance weights: where replies come from older weights there always are some."""
        return self.correction or (RolloutCorrection() if self.max_staleness else None)

    @property
    def gpus(self) -> int:
        """GPUs that sampling takes beside those of the ranks, where it is on GPUs."""
        return self.ranks if self.separate else 0

    @property
    def separate(self) -> bool:
        """Whether replies are sampled in processes of their own."""
        return self.placement == "separate"

    def fits_together(self) -> None:
        """Called by the settings that hold these: pydantic would tell of each engine in turn.

        Raises:
            ValueError: settings contradict each other.
        """
        if not self.separate:
            for name in ("ranks", *self.later):
                if (value := getattr(self, name)) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"rollout.{name} is {value} but rollout.placement is colocated, where the "
                        "training processes sample with the weights that they train; set "
                        f"placement to separate, or clear {name}"
                    )
        if self.segments > self.max_staleness + 1:
            raise ValueError(
                f"rollout.segments is {self.segments} and rollout.max_staleness "
                f"{self.max_staleness}: each segment after the first has weights one step newer, "
                "and the last one's would not be there yet; set segments to at most "
                f"{self.max_staleness + 1}, or raise max_staleness"
            )

    def key_settings(self) -> dict[str, Any]:
        """What changes results: without placement, and without defaults of settings that are
        younger than stored results."""
        shown = self.model_dump(mode="json", exclude=set(self.excluded_from_key))
        for name in self.later:
            if shown[name] == type(self).model_fields[name].default:
                del shown[name]
        return shown


class BuiltinRollout(Placement):
    """This project's decode loop, in the model that is trained. Nothing to install."""

    excluded_from_key: ClassVar[frozenset[str]] = frozenset(
        {"placement", "ranks", "max_logprob_gap"}
    )

    type: Literal["builtin"] = "builtin"
    """Type of the engine."""
    max_logprob_gap: Annotated[float, Field(gt=0.0)] | None = None
    """Largest mean absolute difference (nats) of a token's log-probability between sampling and
    training. Beyond it the stage fails. Empty: 0.001 in fp32, 0.2 in bf16 and fp16. Not part of the
    stage key."""
    correction: RolloutCorrection | None = None
    """Importance weights for the difference between sampling and training. Empty: none, or with
    max_staleness above 0 the defaults of these settings."""


class VllmRollout(Placement):
    """vLLM, in the training process of each rank or in processes of its own. It gets the new
    weights before every rollout."""

    excluded_from_key: ClassVar[frozenset[str]] = frozenset(
        {"placement", "ranks", "gpu_memory_utilization", "cpu_cache_mib", "tensor_parallel"}
    )

    type: Literal["vllm"] = "vllm"
    """Type of the engine."""
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.3
    """Fraction of each GPU's memory for the engine (weights and KV cache) while it samples. It is
    freed for the updates. Not part of the stage key."""
    cpu_cache_mib: PositiveInt = 512
    """KV cache per rank in MiB when the ranks run on the CPU, where it is not freed. Not part of
    the stage key."""
    tensor_parallel: PositiveInt = 1
    """GPUs that share one engine, each with a part of every layer: for a policy whose second copy
    does not fit on each GPU. It must divide the model's attention heads and, where placement is
    colocated, the ranks of a node. Not part of the stage key, as the number of ranks is not."""
    max_logprob_gap: Annotated[float, Field(gt=0.0)] = 0.2
    """Largest mean absolute difference (nats) of the log-probabilities of engine and trainer.
    Beyond it the stage fails: the replies are another policy's."""
    correction: RolloutCorrection | None = RolloutCorrection()
    """Importance weights for the difference between vLLM and trainer. Empty: none, or with
    max_staleness above 0 the defaults of these settings."""

    @property
    def gpus(self) -> int:
        return super().gpus * self.tensor_parallel


Rollout = BuiltinRollout | VllmRollout
