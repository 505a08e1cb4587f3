"""The harness's results of two models, as the plain numbers that the stage writes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from rlhf_core.evaluation.statistics import mean, standard_error


def summary(found: Mapping[str, Any], members: Mapping[str, list[str]]) -> dict[str, Any]:
    """lm_eval.json, see rlhf_core/evaluation/harness/stage.py.

    Args:
        found: "base" and "policy" -> what the harness's evaluate returned.
        members: name in lm_eval.tasks -> names of its tasks.
    """
    policy = found["policy"]
    models = {
        name: {task: metrics_of(row) for task, row in result["results"].items()}
        for name, result in found.items()
    }
    models = {name: {t: m for t, m in rows.items() if m} for name, rows in models.items()}
    shown = [
        each
        for name, tasks in members.items()
        for each in ([name] if name in models["policy"] else tasks)
    ]
    tasks = {}
    for name in models["policy"]:
        counts = policy["n-samples"].get(name) or {}
        tasks[name] = {
            "n": counts.get("effective", policy["results"][name].get("sample_len")),
            "of": counts.get("original"),
            "num_fewshot": policy["n-shot"].get(name),
            "higher_is_better": dict(policy["higher_is_better"].get(name) or {}),
        }
    return {
        "lm_eval": version("lm-eval"),
        "shown": list(dict.fromkeys(shown)),
        "tasks": tasks,
        "models": models,
        "change": {name: _changes(found, models, name) for name in tasks},
    }


def metrics_of(row: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """ "metric,filter" -> value and standard error, of one task's results."""
    found = {}
    for key, value in row.items():
        metric, comma, used = key.partition(",")
        if comma and not metric.endswith("_stderr") and _is_number(value):
            error = row.get(f"{metric}_stderr,{used}")
            found[key] = {"value": _finite(value), "stderr": _finite(error)}
    return found


def _changes(
    found: Mapping[str, Any], models: Mapping[str, Any], task: str
) -> dict[str, dict[str, float | None]]:
    """The finished model's numbers minus the base model's."""
    changes: dict[str, dict[str, float | None]] = {}
    for key, row in models["policy"][task].items():
        before, after = (models["base"].get(task) or {}).get(key, {}).get("value"), row["value"]
        if before is None or after is None:
            continue
        pairs = _pairs(found, task, key)
        known = _is_mean([a for a, _ in pairs], before) and _is_mean([b for _, b in pairs], after)
        changes[key] = {
            "value": after - before,
            "stderr": standard_error([b - a for a, b in pairs]) if known else None,
        }
    return changes


def _pairs(found: Mapping[str, Any], task: str, key: str) -> list[tuple[float, float]]:
    """A metric of each example, of base and finished model; empty where it is no number."""
    metric, _, used = key.partition(",")
    values: list[dict[int, float]] = []
    for name in ("base", "policy"):
        samples = [s for s in found[name]["samples"].get(task) or [] if s["filter"] == used]
        if not all(_is_number(s.get(metric)) for s in samples):
            return []
        values.append({s["doc_id"]: float(s[metric]) for s in samples})
    before, after = values
    return [(before[i], after[i]) for i in before] if before.keys() == after.keys() else []


def _is_mean(values: list[float], total: float) -> bool:
    """Whether a metric is the mean of its examples', so that their differences tell its error."""
    return len(values) > 1 and math.isclose(mean(values), total, rel_tol=1e-9, abs_tol=1e-12)


def _is_number(value: Any) -> bool:
    return hasattr(value, "__float__") and not isinstance(value, str)


def _finite(value: Any) -> float | None:
    if not _is_number(value):
        return None
    number = float(value)
    return number if math.isfinite(number) else None
