"""Rule rewards: score replies without a model or a GPU. Imports no torch."""

from rlhf_core.rewards.check import check_rewards
from rlhf_core.rewards.rules import Rules

__all__ = ["Rules", "check_rewards"]
