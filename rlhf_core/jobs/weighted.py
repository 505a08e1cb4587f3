"""The base of all rewards."""

from __future__ import annotations

from rlhf_core.jobs.base import Settings


class WeightedReward(Settings):
    """The base of all rewards."""

    weight: float = 1.0
    """Factor of this reward in the sum. A negative one inverts it."""
