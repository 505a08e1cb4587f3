"""Rule rewards: scores of replies that need no model and no GPU. No torch in here."""

from rlhf_core.rewards.check import check_rewards
from rlhf_core.rewards.rules import Rules

__all__ = ["Rules", "check_rewards"]
