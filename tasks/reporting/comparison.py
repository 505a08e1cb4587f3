"""Runs beside each other: settings that differ, evaluation, replies to the same prompts, cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_core.evaluation.intervals import difference
from rlhf_core.store import Store
from tasks.events import seconds
from tasks.reporting.cost import cost, reused
from tasks.reporting.curves import overlay, read_metrics
from tasks.reporting.differences import unequal
from tasks.reporting.evaluation import read_samples
from tasks.reporting.markdown import embedded, sample_table, table
from tasks.reporting.past import COLUMNS, PastRun, rewards_note
from tasks.reporting.price_list import GROUPS, cell, part_of

NOT_COMPARED = {
    "name",
    "store",
    "author",
    "preset",
    "launcher",
    "tracking",
    "openlineage",
    "gpu_hour_price",
}
"""Settings that change neither results nor times."""
SHOWN = 8  # prompts with their replies

Rows = list[list[str]]


@dataclass(frozen=True)
class Section:
    """A table with a title, its heads first. note: a sentence below it."""

    title: str
    rows: Rows
    note: str = ""


def compare(store: Store, runs: Sequence[PastRun]) -> list[Section]:
    """The tables of a comparison; those without a row are left out."""
    return _sections(runs, [samples_of(store, run) for run in runs])


def _sections(
    runs: Sequence[PastRun], samples: Sequence[dict[str, dict[str, Any]]]
) -> list[Section]:
    found = [
        Section("Runs", _about(runs)),
        Section("Settings that differ", _settings(runs)),
        Section("Evaluation", _evaluation(runs), _note(runs)),
        Section(
            f"Differences to {runs[0].id} on the same prompts", _differences(runs, samples),
            "95 % intervals of a paired bootstrap over the prompts that both have answered.",
        ),
        Section("Time and cost", _costs(runs)),
    ]  # fmt: skip
    return [section for section in found if len(section.rows) > 1]


def page_of(store: Store, runs: Sequence[PastRun]) -> str:
    """The comparison in Markdown, with curves over each other and replies to the same prompts."""
    parts = ["# Comparison"]
    samples = [samples_of(store, run) for run in runs]
    for section in _sections(runs, samples):
        parts += [f"## {section.title}", table(section.rows), section.note]
    metrics = {
        run.id: {name: read_metrics(store, r.digest) for name, r in run.stages.items()}
        for run in runs
    }
    if curves := overlay(metrics):
        parts += ["## Curves", f"![training curves]({embedded(curves, 'png')})"]
    if replies := _replies(runs, samples)[:SHOWN]:
        names = {run.id: run.id for run in runs}
        parts += ["## Replies to the same prompts"]
        parts += [sample_table(sample, names) for sample in replies]
    return "\n\n".join(part for part in parts if part) + "\n"


def samples_of(store: Store, run: PastRun) -> dict[str, dict[str, Any]]:
    """Prompt -> the line of samples.jsonl; {} without an evaluation."""
    found = run.stages.get("evaluate")
    lines = read_samples(store, found.digest) if found else []
    return {str(line.get("prompt")): line for line in lines if "policy" in line}


def _heads(runs: Sequence[PastRun]) -> list[str]:
    return ["", *(run.id for run in runs)]


def _about(runs: Sequence[PastRun]) -> Rows:
    rows = [_heads(runs)]
    for label, key in (
        ("name", "name"), ("author", "author"), ("started", "started"), ("state", "state"),
        ("verdict", "verdict"),
    ):  # fmt: skip
        rows.append([label, *(str(run.record.get(key) or "-") for run in runs)])
    return rows


def _settings(runs: Sequence[PastRun]) -> Rows:
    kept = [
        {key: v for key, v in run.settings.items() if key.partition(".")[0] not in NOT_COMPARED}
        for run in runs
    ]
    pairs = unequal(kept)
    return [_heads(runs), *([key, *map(_setting, values)] for key, values in pairs.items())]


def _setting(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _evaluation(runs: Sequence[PastRun]) -> Rows:
    """The final models' numbers, in the order of the report's table."""
    rows = [_heads(runs)]
    for row in (row for _, group in GROUPS for row in group):
        parts = [part_of(row, run.evaluation).get("policy") or {} for run in runs]
        cells = [cell(part, row) for part in parts]
        if any(cells):
            label = row.label.format(start="the start model")
            rows.append([label, *(text or "-" for text in cells)])
    for name, label in (
        ("win", "win rate over the start model"),
        ("gain", "gain of the gold score"),
    ):
        column = next(column for column in COLUMNS if column.name == name)
        values = [column.value(run) for run in runs]
        if any(values):
            rows.append([label, *(value[1] if value else "-" for value in values)])
    return rows


def _note(runs: Sequence[PastRun]) -> str:
    """Which of the numbers cannot be compared."""
    alike = len({run.measured_on for run in runs if run.policy}) < 2
    text = "Held-out prompts, sampling or judge differ: compare these numbers with care."
    return " ".join(filter(None, ["" if alike else text, rewards_note(runs)]))


def _differences(runs: Sequence[PastRun], samples: Sequence[dict[str, dict[str, Any]]]) -> Rows:
    """Of the scores of each run's replies to those of the first run, by the same judge."""
    first, rows = samples[0], [_heads(runs)]
    for judge in ("reward", "gold"):
        judges = [run.gold_judge if judge == "gold" else run.rewarded_by for run in runs]
        cells = []
        for run, lines, name in zip(runs, samples, judges, strict=True):
            alike = name == judges[0]
            scored = [p for p in lines if p in first and _score(first[p], judge) is not None]
            pairs = [(_score(lines[p], judge), _score(first[p], judge)) for p in scored]
            known = [(a, b) for a, b in pairs if a is not None and b is not None]
            if run is runs[0] or not alike or len(known) < 2:
                cells.append("-")
                continue
            ours, theirs = zip(*known, strict=True)
            found = difference(ours, theirs, seed=0)
            interval = f"{found['low']:+.3f} to {found['high']:+.3f}"
            cells.append(f"{found['mean']:+.3f} ({interval}, {len(known)} prompts)")
        if any(text != "-" for text in cells):
            rows.append(["gold score" if judge == "gold" else judge, *cells])
    return rows


def _score(line: dict[str, Any], judge: str) -> float | None:
    value = (line.get(judge) or {}).get("policy")
    return float(value) if isinstance(value, int | float) else None


def _costs(runs: Sequence[PastRun]) -> Rows:
    """Work of each stage, and what it adds up to."""
    rows = [_heads(runs)]
    for name in dict.fromkeys(name for run in runs for name in run.stages):
        cells = []
        for run in runs:
            result = run.stages.get(name)
            if result is None:
                cells.append("-")
            elif result.reused:
                cells.append(reused(result))
            else:
                found = cost([result], run.price)
                waited = f", waited {seconds(found.waited)}" if found.waited >= 1 else ""
                cells.append(f"{seconds(found.work)}{waited}")
        rows.append([name, *cells])
    rows.append(["all: work", *(seconds(run.cost.work) for run in runs)])
    rows.append(["all: waiting", *(seconds(run.cost.waited) for run in runs)])
    if any(run.cost.gpu_hours for run in runs):
        rows.append(["GPU-hours", *(f"{run.cost.gpu_hours:.3g}" for run in runs)])
    if any(run.cost.price is not None for run in runs):
        prices = (run.cost.price for run in runs)
        rows.append(["cost", *("-" if price is None else f"{price:.2f}" for price in prices)])
    return rows


def _replies(
    runs: Sequence[PastRun], samples: Sequence[dict[str, dict[str, Any]]]
) -> list[dict[str, Any]]:
    """For each prompt that all have answered: each run's reply and scores, as `sample_table` takes
    them."""
    found = []
    for prompt in samples[0]:
        lines = [lines.get(prompt) for lines in samples]
        if any(line is None for line in lines):
            continue
        named = {run.id: line for run, line in zip(runs, lines, strict=True) if line}
        scores = {
            judge: {name: _score(line, judge) for name, line in named.items()}
            for judge in ("reward", "gold")
            if any(_score(line, judge) is not None for line in named.values())
        }
        replies = {name: line["policy"] for name, line in named.items()}
        greedy = {name: (line.get("greedy") or {}).get("policy") for name, line in named.items()}
        found.append({"prompt": prompt, **replies, **scores, "greedy": greedy})
    return found
