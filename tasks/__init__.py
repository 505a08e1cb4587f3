"""Prefect tasks, one per stage, and the launchers that run their jobs. No torch in here."""

from tasks.publish import champion, keep_candidate, publish
from tasks.report import render, report
from tasks.stages import (
    compare,
    evaluate,
    import_model,
    label,
    ppo,
    preflight,
    prepare_data,
    reward,
    sft,
)

__all__ = [
    "champion",
    "compare",
    "evaluate",
    "import_model",
    "keep_candidate",
    "label",
    "ppo",
    "preflight",
    "prepare_data",
    "publish",
    "render",
    "report",
    "reward",
    "sft",
]
