"""Rollout engines: what samples the replies in online reinforcement learning."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rlhf_core.jobs.base import PositiveInt, Settings


class BuiltinRollout(Settings):
    """This project's decode loop, in the model that is trained. Nothing to install."""

    type: Literal["builtin"] = "builtin"
    """Type of the engine."""


class VllmRollout(Settings):
    """vLLM in the training process of each rank. It gets the new weights before every rollout."""

    excluded_from_key: ClassVar[frozenset[str]] = frozenset(
        {"gpu_memory_utilization", "cpu_cache_mib"}
    )

    type: Literal["vllm"] = "vllm"
    """Type of the engine."""
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.3
    """Fraction of each GPU's memory for the engine (weights and KV cache) while it samples. It is
    freed for the updates. Not part of the stage key."""
    cpu_cache_mib: PositiveInt = 512
    """KV cache per rank in MiB when the ranks run on the CPU, where it is not freed. Not part of
    the stage key."""
    max_logprob_gap: Annotated[float, Field(gt=0.0)] = 0.2
    """Largest mean absolute difference (nats) of the log-probabilities of engine and trainer.
    Beyond it the stage fails: the replies are another policy's."""


Rollout = BuiltinRollout | VllmRollout
