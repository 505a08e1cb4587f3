"""What online algorithms optimise: a weighted sum of rewards."""

from __future__ import annotations

from typing import Literal

from rlhf_core.jobs.base import Settings


class ModelReward(Settings):
    """The trained reward model's score."""

    type: Literal["model"] = "model"
    """Kind of reward."""
    weight: float = 1.0
    """Factor in the sum."""


Reward = ModelReward
