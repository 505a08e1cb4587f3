"""The evaluation as tables and sentences. Parts of the artifact may be missing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_core.errors import ConfigError, StoreError
from rlhf_core.jobs import PipelineConfig
from rlhf_core.pipeline import recipe
from rlhf_core.store import Store
from tasks.reporting.verdict import Names, Verdict, conclude
from tasks.run import Run

MODELS = ("base", "sft", "policy")


def read_evaluation(store: Store, digest: str) -> dict[str, Any]:
    """evaluation.json of an artifact; {} when it has none."""
    try:
        value = json.loads(store.read_bytes(digest, "evaluation.json"))
    except (ConfigError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_samples(store: Store, digest: str) -> list[dict[str, Any]]:
    """samples.jsonl of an artifact; [] when it has none."""
    try:
        text = store.read_bytes(digest, "samples.jsonl").decode("utf-8")
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ConfigError, StoreError, ValueError):
        return []


def evaluation_of(run: Run, digest: str) -> Evaluation:
    """An evaluation of the run, with names for its models."""
    data = read_evaluation(run.store, digest)
    return Evaluation(data, recipe.policy_label(run.config), labelled_by=gold_labeller(run.config))


def gold_labeller(config: PipelineConfig) -> str | None:
    """The gold judge, if it also labels pairs that the run trains on."""
    labels = [step for step in recipe.steps(config) if step.algorithm == "label"]
    labellers = [recipe.label_settings(config, step)[1].labeller for step in labels]
    return config.evaluate.judge if config.evaluate.judge in labellers else None


def comparison_of(run: Run) -> Evaluation | None:
    """The evaluation of the final model beside the champion, if the run made one."""
    if "compare" not in run.stages:
        return None
    data = read_evaluation(run.store, run.stages["compare"].digest)
    return Evaluation(data, recipe.policy_label(run.config), "champion", gold_labeller(run.config))


@dataclass(frozen=True)
class Evaluation:
    """evaluation.json; rlhf_core/evaluation/evaluate.py has its schema."""

    data: Mapping[str, Any]
    policy: str = "PPO"
    other: str = "SFT"
    labelled_by: str | None = None  # the gold judge, if it labelled the reward model's pairs too

    @property
    def names(self) -> dict[str, str]:
        """Display names of the models."""
        return {"base": "base", "sft": self.other, "policy": self.policy}

    @property
    def start(self) -> str:
        """The model that the final one is compared with."""
        return "sft" if "sft" in (self.data.get("models") or {}) else "base"

    def markdown(self) -> str:
        """All parts of the evaluation that exist."""
        parts = [self.models(), self.win_rates(), self.verdict(), self.reward_model()]
        return "\n\n".join(part for part in parts if part) or "No evaluation was made."

    def models(self) -> str:
        """Table of base, SFT and final model."""
        models = self.data.get("models") or {}
        heldout = self.data.get("heldout") or {}
        columns = [m for m in MODELS if m in models or m in heldout]
        if not columns:
            return ""
        rows = [
            ("reward", [_pm(models.get(m), "reward") for m in columns]),
            ("gold score", [_pm(models.get(m), "gold") for m in columns]),
            (
                f"KL to {self.names[self.start]} (nats per reply)",
                [_pm(models.get(m), "kl") for m in columns],
            ),
            ("length (tokens)", [_number(models.get(m), "length_mean", "{:.1f}") for m in columns]),
            ("finished replies", [_percent(models.get(m), "finished") for m in columns]),
            ("distinct-1", [_number(models.get(m), "distinct_1", "{:.2f}") for m in columns]),
            ("distinct-2", [_number(models.get(m), "distinct_2", "{:.2f}") for m in columns]),
            (
                "begin with the same words",
                [_percent(models.get(m), "top_opening") for m in columns],
            ),
            (
                "same reply to several prompts",
                [_percent(models.get(m), "repeated") for m in columns],
            ),
            ("held-out loss", [_number(heldout.get(m), "loss", "{:.3f}") for m in columns]),
            ("perplexity", [_number(heldout.get(m), "perplexity", "{:.2f}") for m in columns]),
        ]
        counts = {models[m]["n"] for m in columns if "n" in (models.get(m) or {})}
        on = f" ({', '.join(map(str, sorted(counts)))} held-out prompts)" if counts else ""
        head = [f"| mean ± standard error{on} |" + "".join(f" {self.names[m]} |" for m in columns)]
        head.append("| --- |" + " ---: |" * len(columns))
        body = [
            f"| {label} |" + "".join(f" {cell or '–'} |" for cell in cells)
            for label, cells in rows
            if any(cells)
        ]
        return "\n".join(head + body)

    def win_rates(self) -> str:
        """How often the final model's reply beats the other's, by each judge."""
        sentences = []
        endpoint = f"the judge {(self.data.get('judge') or {}).get('model', '')}".strip()
        labels = {"reward": "the reward model", "gold": "the gold judge", "judge": endpoint}
        for judge, label in labels.items():
            rate = (self.data.get("win_rate") or {}).get(judge)
            if rate:
                sentences.append(f"{_interval(rate, 'rate')} of {rate['n']} prompts for {label}")
        other = self.names[self.start]
        start = f"{self.policy}'s reply beats {other}'s on "
        return start + ", on ".join(sentences) + "." if sentences else ""

    def verdict(self) -> str:
        """What the numbers show, the price beside the gain; "" without a final model."""
        shown = self.conclusion()
        return str(shown) if shown else ""

    def conclusion(self) -> Verdict | None:
        """The verdict; None without a final model."""
        if "policy" not in (self.data.get("models") or {}):
            return None
        names = Names(self.policy, self.names[self.start])
        return conclude(self.data, self.start, names, self.labelled_by)

    def reward_model(self) -> str:
        """Table of held-out accuracy, with trivial judges as baselines."""
        model = self.data.get("reward_model") or {}
        if "accuracy" not in model:
            return ""
        rows = [("reward model", model)]
        baselines = model.get("baselines") or {}
        for key, label in (("length", "longer reply wins"), ("bag_of_words", "bag of words")):
            if isinstance(baselines.get(key), dict):
                rows.append((label, baselines[key]))
        head = f"| accuracy on {model.get('n', '?')} held-out pairs | % | 95 % interval |"
        lines = [head, "| --- | ---: | --- |"]
        for label, row in rows:
            interval = "–"
            if "low" in row and "high" in row:
                interval = f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"
            lines.append(f"| {label} | {100 * row['accuracy']:.1f} | {interval} |")
        return "\n".join(lines)


def _pm(row: Mapping[str, Any] | None, name: str) -> str:
    mean = (row or {}).get(f"{name}_mean")
    error = (row or {}).get(f"{name}_se")
    if mean is None:
        return ""
    return f"{mean:.3f} ± {error:.3f}" if error is not None else f"{mean:.3f}"


def _number(row: Mapping[str, Any] | None, name: str, shape: str) -> str:
    value = (row or {}).get(name)
    return "" if value is None else shape.format(value)


def _percent(row: Mapping[str, Any] | None, name: str) -> str:
    value = (row or {}).get(name)
    return "" if value is None else f"{100 * value:.0f} %"


def _interval(row: Mapping[str, Any], name: str) -> str:
    text = f"{100 * row[name]:.0f} %"
    if "low" in row and "high" in row:
        text += f" ({100 * row['low']:.0f} to {100 * row['high']:.0f} %)"
    return text
