"""Rollout engines: what samples the replies in online reinforcement learning."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

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


class BuiltinRollout(Settings):
    """This project's decode loop, in the model that is trained. Nothing to install."""

    excluded_from_key: ClassVar[frozenset[str]] = frozenset({"max_logprob_gap"})

    type: Literal["builtin"] = "builtin"
    """Type of the engine."""
    max_logprob_gap: Annotated[float, Field(gt=0.0)] | None = None
    """Largest mean absolute difference (nats) of a token's log-probability between sampling and
    training. Beyond it the stage fails. Empty: 0.001 in fp32, 0.2 in bf16 and fp16. Not part of the
    stage key."""
    correction: RolloutCorrection | None = None
    """Importance weights for the difference between sampling and training. Empty: none."""


class VllmRollout(Settings):
    """vLLM in the training process of each rank. It gets the new weights before every rollout."""

    excluded_from_key: ClassVar[frozenset[str]] = frozenset(
        {"gpu_memory_utilization", "cpu_cache_mib", "tensor_parallel"}
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
    does not fit on each GPU. It must divide the ranks of a node and the model's attention heads.
    Not part of the stage key, as the number of ranks is not."""
    max_logprob_gap: Annotated[float, Field(gt=0.0)] = 0.2
    """Largest mean absolute difference (nats) of the log-probabilities of engine and trainer.
    Beyond it the stage fails: the replies are another policy's."""
    correction: RolloutCorrection | None = RolloutCorrection()
    """Importance weights for the difference between vLLM and trainer. Empty: none."""


Rollout = BuiltinRollout | VllmRollout
