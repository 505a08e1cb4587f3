"""Prompts by difficulty: which levels a rollout takes its prompts from.

A level is unlocked when the policy passes enough of the prompts of the level before. All follows
from the stage's lines in metrics.jsonl, which its checkpoints hold: a stage that goes on from a
checkpoint takes the same prompts as one that was never stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from rlhf_core.errors import DataError
from rlhf_core.jobs.online import Curriculum
from rlhf_core.training.batching import batch_rows
from rlhf_core.training.online.stage import OnlineStage

LEVEL = "level"  # metric: number of the newest unlocked level, from 1
PASSED = "level_pass_rate"  # metric: of the replies to its prompts; not there without any


def rows_of_step(stage: OnlineStage, step: int) -> list[int]:
    """Numbers of the prompts of a step (from 0), the same on every rank. Every rank calls.

    With a curriculum: of the unlocked levels, in random order.

    Raises:
        DataError: the data set has no levels.
    """
    job, prompts = stage.job, stage.inputs.prompts
    if job.curriculum is None:
        return batch_rows(prompts, job.batch_size, step, job.seed)
    if prompts.levels is None:
        raise DataError(
            f"{job.algorithm}.curriculum is set, but the prompts have no levels; name the column "
            "with their difficulty (data.prompts.curriculum), or clear it."
        )
    _, newest = unlocked_level(stage, job.curriculum)
    unlocked = np.flatnonzero(prompts.levels <= newest)
    return [int(unlocked[i]) for i in batch_rows(len(unlocked), job.batch_size, step, job.seed)]


def unlocked_level(stage: OnlineStage, curriculum: Curriculum) -> tuple[int, float]:
    """Number of the newest unlocked level, from 1, and its prompts' number in the data set."""
    context, levels = stage.context, np.unique(stage.inputs.prompts.levels)
    lines = context.read_metrics() if context.main else []
    number = int(stage.strategy.group.broadcast(newest_level(curriculum, lines, len(levels))))
    return number, float(levels[number - 1])


def newest_level(curriculum: Curriculum, lines: Sequence[Mapping[str, Any]], levels: int) -> int:
    """Number of the newest unlocked level, from 1.

    Args:
        lines: of metrics.jsonl. levels: that there are.
    """
    newest = 1
    rates: list[float] = []  # of the rollouts since the newest level was unlocked
    for line in lines:
        if line.get(LEVEL) == newest and PASSED in line:
            rates.append(line[PASSED])
        recent = rates[-curriculum.window :]
        full = len(recent) == curriculum.window
        if newest < levels and full and sum(recent) / len(recent) > curriculum.pass_rate:
            newest, rates = newest + 1, []
    return newest


def level_metrics(
    stage: OnlineStage, rows: Sequence[Mapping[str, Any]], scores: Tensor
) -> dict[str, float]:
    """The newest unlocked level, and the pass rate of its replies; {} without a curriculum.

    Args:
        rows: of the prompts, one for each reply. scores: (B,) weighted sums of the rewards.
    """
    curriculum = stage.job.curriculum
    if curriculum is None:
        return {}
    number, newest = unlocked_level(stage, curriculum)
    passed = [
        float(score >= curriculum.passing_score)
        for row, score in zip(rows, scores.tolist(), strict=True)
        if row["curriculum"] == newest
    ]
    rate = {PASSED: sum(passed) / len(passed)} if passed else {}
    return {LEVEL: float(number), **rate}
