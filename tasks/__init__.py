"""Prefect tasks, one per stage, and the launchers that run their jobs. No torch in here."""

from tasks.publish import (
    champion,
    compare_with_champion,
    keep_candidate,
    keep_collapsed,
    publish,
)
from tasks.report import render, report
from tasks.stages import (
    TRAIN,
    benchmark,
    evaluate,
    import_model,
    import_reward,
    label,
    preflight,
    prepare_data,
)

__all__ = [
    "TRAIN",
    "benchmark",
    "champion",
    "compare_with_champion",
    "evaluate",
    "import_model",
    "import_reward",
    "keep_candidate",
    "keep_collapsed",
    "label",
    "preflight",
    "prepare_data",
    "publish",
    "render",
    "report",
]
