"""Compares two versions of a model: settings, metrics, lineage, size."""

from __future__ import annotations

import re
from typing import Any

from rlhf_core.errors import StoreError
from rlhf_core.store import Artifact, Store
from tasks.reporting.differences import flat, numbers, side_by_side, unequal

_DIGEST = re.compile(r"[0-9a-f]{64}")
NOT_COMPARED = {"resources", "algorithm", "trust_remote_code"}  # they do not change the result


def evaluated(store: Store, artifact: Artifact) -> dict[str, Any]:
    """Metrics of a published model's evaluation and benchmarks; {} if they are not in the store."""
    found = _metrics(store, "evaluation", artifact.metadata.get("evaluation"))
    benchmarks = _metrics(store, "benchmarks", artifact.metadata.get("lm_eval"))
    if benchmarks:
        found = {**found, "lm_eval": (benchmarks.get("models") or {}).get("policy") or {}}
    return found


def _metrics(store: Store, kind: str, digest: Any) -> dict[str, Any]:
    """The metrics in an artifact's metadata; {} if there are none."""
    try:
        found = store.get(f"{kind}/{digest}").metadata.get("metrics") if digest else None
    except (StoreError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def headline(metrics: dict[str, Any]) -> dict[str, float]:
    """The main metrics of an evaluation, by their names in tables."""
    found: dict[str, float] = {}
    for judge, rate in (metrics.get("win_rate") or {}).items():
        if isinstance(rate, dict) and isinstance(rate.get("rate"), int | float):
            found[f"win rate ({judge})"] = float(rate["rate"])
    models = metrics.get("models") or {}
    policy = models.get("policy") or models.get("ppo") or {}
    for key, label in (("kl_mean", "KL"), ("length_mean", "length")):
        if isinstance(policy.get(key), int | float):
            found[label] = float(policy[key])
    accuracy = (metrics.get("reward_model") or {}).get("accuracy")
    if isinstance(accuracy, int | float):
        found["reward accuracy"] = float(accuracy)
    return found


def difference(store: Store, left: Artifact, right: Artifact) -> dict[str, Any]:
    """The differences between two published models.

    Returns:
        settings, metrics: name -> [left, right] of those that differ; lineage: stage -> [left,
        right] as kind/digest of all; size: bytes of both.
    """
    made = [_stages(store, artifact) for artifact in (left, right)]
    jobs = [
        {
            f"{name}.{key}": value
            for name, artifact in stages.items()
            for key, value in flat(artifact.metadata.get("job") or {}).items()
            if key.split(".")[0] not in NOT_COMPARED and not _names_artifact(value)
        }
        for stages in made
    ]
    measured = [numbers(evaluated(store, artifact)) for artifact in (left, right)]
    refs = [{name: artifact.ref for name, artifact in stages.items()} for stages in made]
    return {
        "settings": unequal(jobs),
        "metrics": unequal(measured),
        "lineage": side_by_side(refs),
        "size": [left.size, right.size],
    }


def _names_artifact(value: Any) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _stages(store: Store, artifact: Artifact) -> dict[str, Artifact]:
    """The artifacts of its lineage by stage, oldest first; repeated stages are numbered."""
    found: dict[str, Artifact] = {}
    known = [a for a in store.lineage(artifact.digest).values() if a is not None]
    for each in sorted(known, key=lambda a: (a.created, a.digest)):
        job = each.metadata.get("job") or {}
        name = str(job.get("algorithm") or each.kind)
        if job.get("purpose"):
            name = f"{name} {job['purpose']}"
        count = sum(other == name or other.startswith(f"{name} #") for other in found)
        found[f"{name} #{count + 1}" if count else name] = each
    return found
