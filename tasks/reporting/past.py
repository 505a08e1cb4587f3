"""Runs by their records in the store: what they measured, took and cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rlhf_core.errors import ArtifactCorrupt, ArtifactNotFound, ConfigError
from rlhf_core.jobs.ensemble import CombineSettings
from rlhf_core.store import Store
from tasks.events import seconds
from tasks.gates import judged
from tasks.reporting.cost import Cost, cost
from tasks.reporting.differences import flat
from tasks.reporting.evaluation import read_evaluation
from tasks.run import StageResult


@dataclass(frozen=True)
class PastRun:
    """A run as its record tells.

    Attributes:
        record: see `Run.save`.
        evaluation: evaluation.json; {} without one.
    """

    record: Mapping[str, Any]
    evaluation: Mapping[str, Any]

    @property
    def id(self) -> str:
        return str(self.record["id"])

    @cached_property
    def stages(self) -> dict[str, StageResult]:
        """The stages in the order in which their results were made."""
        unknown = {"key": "", "seconds": 0.0, "reused": False}
        found = [
            StageResult.model_validate({**unknown, **value, "stage": name})
            for name, value in (self.record.get("stages") or {}).items()
        ]
        found.sort(key=lambda result: str(result.work.get("started", "~")))  # "~": at the end
        return {result.stage: result for result in found}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings, with dotted names."""
        return flat(self.record.get("config") or {})

    @property
    def price(self) -> float | None:
        """Of one GPU for an hour."""
        found = self.settings.get("gpu_hour_price")
        return float(found) if isinstance(found, int | float) else None

    @cached_property
    def cost(self) -> Cost:
        """Of all its stages."""
        return cost(list(self.stages.values()), self.price)

    @property
    def measured_on(self) -> tuple[Any, ...]:
        """What the numbers of the evaluation depend on, beside the model: prompts, sampling and
        judge. Those of two runs can be compared where this is equal."""
        prompts = self.stages.get("data-prompts")
        sampling = self.evaluation.get("sampling") or {}
        judges = (self.gold_judge, self.settings.get("evaluate.judge_endpoint.model"))
        return (prompts and prompts.digest, tuple(sorted(sampling.items())), *judges)

    @property
    def gold_judge(self) -> Any:
        """The judge whose score is called gold."""
        return self.settings.get("evaluate.judge")

    @cached_property
    def rewarded_by(self) -> tuple[str, ...]:
        """What its rewards are from: reward models by their digests, how an ensemble combines
        them, and the rules, if there are any, of the last stage of online RL."""
        models = sorted(r.digest for r in self.stages.values() if r.kind == "reward_model")
        several = len(models) > 1
        how = [self.settings.get(f"reward.{name}") for name in CombineSettings.model_fields]
        stages = self.settings.get("stages") or []
        rewards = [found for stage in stages if (found := self.settings.get(f"{stage}.rewards"))]
        rules = [r for r in rewards[-1:] if any(part.get("type") != "model" for part in r)]
        given = [str(value) for value in how if value not in ([], ())]
        return (*models, *(given if several else ()), *map(str, rules))

    @property
    def policy(self) -> Mapping[str, Any]:
        """The final model's numbers."""
        return (self.evaluation.get("models") or {}).get("policy") or {}


def past_run(store: Store, record: Mapping[str, Any]) -> PastRun:
    """A run by its record, with its evaluation, if the store has it."""
    stage = (record.get("stages") or {}).get("evaluate") or {}
    found = stage.get("metrics") or {}
    if stage and "models" not in found:
        with suppress(ArtifactNotFound, ArtifactCorrupt):  # it was deleted, and others are there
            found = read_evaluation(store, stage["digest"])
    return PastRun(record, found)


# --------------------------------------------------------------------------- a table of many


Value = tuple[float, str]
"""A number to sort by, and its text."""


@dataclass(frozen=True)
class Column:
    """A number of a run.

    Attributes:
        best: whether the highest or the lowest is at the top.
    """

    name: str
    best: int
    value: Callable[[PastRun], Value | None]


def _mean(name: str) -> Callable[[PastRun], Value | None]:
    def value(run: PastRun) -> Value | None:
        mean, error = run.policy.get(f"{name}_mean"), run.policy.get(f"{name}_se")
        if mean is None:
            return None
        return mean, f"{mean:.3f}" if error is None else f"{mean:.3f} ± {error:.3f}"

    return value


def _number(find: Callable[[PastRun], Any], shape: str) -> Callable[[PastRun], Value | None]:
    def value(run: PastRun) -> Value | None:
        found = find(run)
        return None if found is None else (float(found), shape.format(found))

    return value


def _at(*keys: str) -> Callable[[PastRun], Any]:
    """A number in evaluation.json; None where it is not."""

    def find(run: PastRun) -> Any:
        found: Any = run.evaluation
        for key in keys:
            found = (found or {}).get(key)
        return found

    return find


def _gain(run: PastRun) -> Value | None:
    found = (run.evaluation.get("differences") or {}).get("gold")
    if not found:
        return None
    return found["mean"], f"{found['mean']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"


def _win_rate(run: PastRun) -> Value | None:
    """Of the judge that the gates go by; if all replies were equally long, where that is known."""
    name, rate = judged(run.evaluation)
    found = rate.get("length_controlled") or rate
    if not found:
        return None
    low, high = found.get("low"), found.get("high")
    interval = "" if low is None else f" ({low:.0%} to {high:.0%})"
    return found["rate"], f"{found['rate']:.0%}{interval} {name}"


def _time(run: PastRun) -> Value | None:
    return (run.cost.work, seconds(run.cost.work)) if run.stages else None


COLUMNS = (
    Column("gain", -1, _gain),
    Column("gold", -1, _mean("gold")),
    Column("reward", -1, _mean("reward")),
    Column("win", -1, _win_rate),
    Column("kl", 1, _mean("kl")),
    Column("loss", 1, _number(_at("heldout", "policy", "loss"), "{:.3f}")),
    Column("questions", -1, _number(_at("questions", "models", "policy", "rate"), "{:.0%}")),
    Column("distinct-2", -1, _number(_at("models", "policy", "distinct_2"), "{:.2f}")),
    Column("length", 1, _number(_at("models", "policy", "length_mean"), "{:.1f}")),
    Column("work", 1, _time),
    Column("gpu-hours", 1, _number(lambda r: r.cost.gpu_hours or None, "{:.3g}")),
    Column("cost", 1, _number(lambda r: r.cost.price, "{:.2f}")),
)


def leaderboard(runs: Sequence[PastRun], sort: str | None = None) -> tuple[list[list[str]], str]:
    """Runs with their numbers, one row each; columns without any number are left out.

    Args:
        sort: name of a column, best first; runs without that number are last. None: as given.

    Returns:
        The rows, heads first, and a note on which numbers can be compared ("": all).

    Raises:
        ConfigError: there is no such column.
    """
    names = [column.name for column in COLUMNS]
    if sort is not None and sort not in names:
        raise ConfigError(f"--sort is {sort!r}; expected one of {', '.join(names)}.")
    values = {run.id: {column.name: column.value(run) for column in COLUMNS} for run in runs}
    if sort is not None:
        best = next(column.best for column in COLUMNS if column.name == sort)

        def rank(run: PastRun) -> tuple[bool, float]:
            value = values[run.id][sort]
            return value is None, best * value[0] if value else 0.0

        runs = sorted(runs, key=rank)
    shown = [name for name in names if any(values[run.id][name] for run in runs)]
    groups = _groups(runs)
    grouped = len(set(groups.values())) > 1
    rows = [["RUN", "NAME", "VERDICT", *(name.upper() for name in shown)]]
    rows[0] += ["EVAL"] if grouped else []
    for run in runs:
        cells = [value[1] if (value := values[run.id][name]) else "-" for name in shown]
        group = [groups.get(run.id, "-")] if grouped else []
        verdict = run.record.get("verdict") or run.record.get("state") or "-"
        rows.append([run.id, str(run.record.get("name", "")), str(verdict), *cells, *group])
    alike = (
        "Numbers can be compared where EVAL has the same letter: the same held-out prompts, "
        "sampling and judge."
    )
    return rows, " ".join(filter(None, [alike if grouped else "", rewards_note(runs)]))


def _groups(runs: Sequence[PastRun]) -> dict[str, str]:
    """Run -> the letter of those that were measured alike; of evaluated runs."""
    letters: dict[tuple[Any, ...], str] = {}
    found = {}
    for run in runs:
        if run.policy:
            number = len(letters)
            letter = chr(ord("A") + number) if number < 26 else str(number + 1)
            found[run.id] = letters.setdefault(run.measured_on, letter)
    return found


def rewards_note(runs: Sequence[PastRun]) -> str:
    """A warning if the rewards are not from the same models and rules; "" if they are."""
    if len({run.rewarded_by for run in runs if run.policy.get("reward_mean") is not None}) < 2:
        return ""
    return "Rewards are those of different reward models or rules, and cannot be compared."
