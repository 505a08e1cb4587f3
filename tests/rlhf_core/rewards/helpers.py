"""Scores of single replies, and functions that tests name as a user names his own."""

from __future__ import annotations

import time
from typing import Any

from rlhf_core.jobs.rewards import Reward
from rlhf_core.rewards import Rules

HERE = "tests.rlhf_core.rewards.helpers"


def score(rule: Reward, *replies: str, finished: bool = True, **row: Any) -> list[float]:
    """What a rule gives for some replies, all to a prompt with this row."""
    count = len(replies)
    prompts = [[{"role": "user", "content": "Hi"}]] * count
    [scores] = Rules([rule], seed=0).score(
        prompts, list(replies), [{"row": 7, **row}] * count, [finished] * count,
        [len(reply.split()) + finished for reply in replies],
    )  # fmt: skip
    return scores


def brevity(*, prompts: list, replies: list, rows: list, finished: list) -> list[float]:
    return [1.0 / (1 + len(reply)) for reply in replies]


def sees_all(*, prompts: list, replies: list, rows: list, finished: list) -> list[float]:
    values = zip(prompts, replies, rows, finished, strict=True)
    return [len(p[0]["content"]) + 10 * len(r) + 100 * row["row"] + f for p, r, row, f in values]


def raises_at_bad(**batch: list) -> list[float]:
    if "bad" in batch["replies"]:
        raise KeyError("no such thing")
    return [0.0] * len(batch["replies"])


def raises_for_two(**batch: list) -> list[float]:
    if len(batch["replies"]) > 1:
        raise TimeoutError("not the limit's")
    return [0.0]


def leaves(**batch: list) -> list[float]:
    raise SystemExit(3)


def sleeps(**batch: list) -> list[float]:
    time.sleep(60)
    return [0.0] * len(batch["replies"])


def too_few(**batch: list) -> list[float]:
    return [0.0]


def not_finite(**batch: list) -> list[float]:
    return [0.0, float("nan")]


def a_text(**batch: list) -> list:
    return [0.0, "1"]


def a_number(**batch: list) -> float:
    return 1.0


def an_array(**batch: list) -> Any:
    import numpy as np

    return np.arange(len(batch["replies"]), dtype=np.float32)


def wrong_names(replies: list) -> list[float]:
    return [0.0] * len(replies)


NOT_CALLABLE = 3
