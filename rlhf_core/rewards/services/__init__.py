"""Rewards that services compute over HTTP, asked while other replies are still sampled."""

from rlhf_core.rewards.services.answer import Answer, Item
from rlhf_core.rewards.services.services import Services

__all__ = ["Answer", "Item", "Services"]
