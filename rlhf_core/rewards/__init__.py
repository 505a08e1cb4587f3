"""Rewards by rule: numbers for replies that no model gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rlhf_core.jobs.rewards import Reward


class Rules:
    """Everything in `rewards` that is not the reward model.

    Attributes:
        names: one per rule, unique. weights: one per rule.
        troubles: what went wrong -> replies that got a rule's lowest score for it, since the start.
    """

    def __init__(self, rewards: Sequence[Reward], seed: int) -> None:
        self.names: list[str] = []
        self.weights: list[float] = []
        self.troubles: Counter[str] = Counter()

    def score(
        self,
        prompts: list[list[dict[str, Any]]],
        replies: list[str],
        rows: list[dict[str, Any]],
        finished: list[bool],
    ) -> list[list[float]]:
        """One list per rule, one number per sample, without the weights."""
        return []
