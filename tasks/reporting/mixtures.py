"""The sources of a run's mixtures: their rows, their part of an epoch, and held-out metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_core.jobs.sources import EpochSettings
from tasks.reporting.markdown import table
from tasks.reporting.model_card import data_card
from tasks.run import Run, StageResult

SHOWN = {
    "heldout_loss": "held-out loss", "heldout_accuracy": "held-out accuracy",
    "heldout_reward": "held-out reward",
}  # fmt: skip


def mixtures(run: Run) -> list[str]:
    """A table for each mixture; one row for each of its sources."""
    found = []
    for name, result in run.stages.items():
        if result.kind == "dataset":
            card = data_card(run.store, run.store.get(result.digest))
            if mixture := card.get("mixture"):
                found += [f"### {name}", _table(run, result.digest, mixture)]
    return found


def _table(run: Run, digest: str, mixture: dict[str, Any]) -> str:
    sources = mixture["sources"]
    trained = [r for r in run.stages.values() if digest in run.store.get(r.digest).parents]
    measured = dict(pair for result in trained for pair in _metrics(result))
    heads = ["source", "read", "train", "held out", "dropped", "bad", "tokens", "in an epoch"]
    rows = [[*heads, *measured]]
    for source in sources:
        name = source["name"]
        numbers = [
            source["read"], source["train"], source["heldout"], sum(source["dropped"].values()),
            sum(source["bad"].values()), source["tokens"], source["epoch"],
        ]  # fmt: skip
        shown = ["" if n is None else f"{n:,}" for n in numbers]
        values = [values.get(name) for values in measured.values()]
        rows.append([name, *shown, *("" if v is None else f"{v:.3f}" for v in values)])
    rule = EpochSettings(**{name: mixture[name] for name in EpochSettings.model_fields})
    return f"{table(rows)}\n\n{rule.describe()}"


def _metrics(result: StageResult) -> Iterator[tuple[str, dict[str, float]]]:
    """Head of a column -> value of each source, for the metrics of a stage."""
    heldout = result.metrics.get("heldout") or {}  # of a reward model
    if of_sources := heldout.get("sources"):
        yield (
            f"{result.stage}: held-out accuracy",
            {k: v["accuracy"] for k, v in of_sources.items()},
        )
    for model, found in heldout.items() if result.stage == "evaluate" else ():
        if "sources" in found:
            yield f"evaluate: held-out loss, {model}", found["sources"]
    for metric, label in SHOWN.items():
        start = f"{metric}/"
        values = {k[len(start) :]: v for k, v in result.metrics.items() if k.startswith(start)}
        if values:
            yield f"{result.stage}: {label}", values
