"""The learning rate of a step."""

from __future__ import annotations

from rlhf_core.jobs import TrainSettings
from rlhf_core.training.batching import learning_rate_scale
from rlhf_core.training.checkpoint import Checkpointer
from rlhf_core.training.strategy import Strategy


def set_learning_rate(
    settings: TrainSettings, strategy: Strategy, checkpointer: Checkpointer, step: int, total: int
) -> float:
    """Set the rates of a step (from 0): warm-up and schedule, times the checkpointer's factor after
    a non-finite loss.

    Returns:
        The rate of parameters whose peak is `learning_rate`.
    """
    scale = learning_rate_scale(step, total, settings.warmup_fraction, settings.schedule)
    scale *= checkpointer.rate
    strategy.set_learning_rate(scale)
    return settings.learning_rate * scale
