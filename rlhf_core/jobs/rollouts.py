"""What replies are sampled with, while a policy is trained on them."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rlhf_core.jobs.base import PositiveInt, Settings


class BuiltinRollout(Settings):
    """The decode loop of this project, in the model that is trained: nothing to install."""

    type: Literal["builtin"] = "builtin"
    """Rollout kind."""


class VllmRollout(Settings):
    """vLLM in the training process of each rank; it gets the new weights before every rollout."""

    excluded_from_key: ClassVar[frozenset[str]] = frozenset(
        {"gpu_memory_utilization", "cpu_cache_mib"}
    )

    type: Literal["vllm"] = "vllm"
    """Rollout kind."""
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.3
    """Share of each GPU that the engine takes while it samples (weights, keys and values); it gives
    it back for the updates. Does not change the stage key."""
    cpu_cache_mib: PositiveInt = 512
    """MiB of main memory per rank for keys and values where the ranks run on the CPU, which keeps
    them. Does not change the stage key."""
    max_logprob_gap: Annotated[float, Field(gt=0.0)] = 0.2
    """The stage fails when the log-probabilities of a rollout's tokens (nats, mean of the absolute
    difference) differ by more between engine and trainer: the replies are then another policy's."""


Rollout = BuiltinRollout | VllmRollout
