"""The evaluation as tables and sentences. Parts of the artifact may be missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf_core.pipeline import recipe
from rlhf_core.store import Store
from tasks.reporting.benchmarks import FILE, benchmarks_digest
from tasks.reporting.files import read_json, read_lines
from tasks.reporting.judges import Judge, judges_of
from tasks.reporting.price_list import openings, price_list, sampling
from tasks.reporting.prices import Names
from tasks.reporting.verdict import Verdict, conclude
from tasks.run import Run

JUDGES = {"reward": "the reward model", "gold": "the gold judge"}


def read_evaluation(store: Store, digest: str) -> dict[str, Any]:
    """evaluation.json of an artifact; see `read_json`."""
    return read_json(store, digest, "evaluation.json")


def read_samples(store: Store, digest: str) -> list[dict[str, Any]]:
    """samples.jsonl of an artifact; see `read_lines`."""
    return read_lines(store, digest, "samples.jsonl")


def evaluation_of(run: Run, digest: str) -> Evaluation:
    """An evaluation of the run, with names for its models."""
    benchmarks = benchmarks_digest(run)
    measured = read_json(run.store, benchmarks, FILE) if benchmarks else {}
    data, policy = read_evaluation(run.store, digest), recipe.policy_label(run.config)
    return Evaluation(data, policy, judges=judges_of(run.config), benchmarks=measured)


def comparison_of(run: Run) -> Evaluation | None:
    """The evaluation of the final model beside the champion, if the run made one."""
    if "compare" not in run.stages:
        return None
    data = read_evaluation(run.store, run.stages["compare"].digest)
    return Evaluation(data, recipe.policy_label(run.config), "champion", judges_of(run.config))


@dataclass(frozen=True)
class Evaluation:
    """evaluation.json; rlhf_core/evaluation/numbers.py has its schema.

    Attributes:
        judges: key of a judge's numbers -> the judge. benchmarks: lm_eval.json, or {}.
    """

    data: Mapping[str, Any]
    policy: str = "PPO"
    other: str = "SFT"
    judges: Mapping[str, Judge] = field(default_factory=dict)
    benchmarks: Mapping[str, Any] = field(default_factory=dict)

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
        """Table of base, SFT and final model: what was gained, and what it cost."""
        known = {*(self.data.get("models") or {}), *(self.data.get("heldout") or {})}
        columns = {key: name for key, name in self.names.items() if key in known}
        found = [
            price_list(self.data, columns, self.start),
            openings(self.data, columns),
            sampling(self.data),
        ]
        return "\n\n".join(text for text in found if text)

    def win_rates(self) -> str:
        """How often the final model's reply beats the other's, and which judge is independent."""
        sentences = []
        for key, rate in (self.data.get("win_rate") or {}).items():
            name = self.judges[key].name if key in self.judges else JUDGES.get(key, key)
            text = f"{_interval(rate, 'rate')} of {rate['n']} prompts for {name}"
            if equal := rate.get("length_controlled"):
                text += f" ({_interval(equal, 'rate')} if all replies were equally long)"
            sentences.append(text)
        other = self.names[self.start]
        start = f"{self.policy}'s reply beats {other}'s on "
        text = start + ", on ".join(sentences) + "." if sentences else ""
        facts = [
            f"- {judge.name[:1].upper()}{judge.name[1:]} is "
            f"{'independent' if judge.independent else 'not independent'}: it {judge.why}."
            for judge in self.judges.values()
        ]
        return "\n".join(filter(None, [text, "" if not facts else "\n" + "\n".join(facts)])).strip()

    def verdict(self) -> str:
        """What the numbers show, the price beside the gain; "" without a final model."""
        shown = self.conclusion()
        return str(shown) if shown else ""

    def conclusion(self) -> Verdict | None:
        """The verdict; None without a final model."""
        if "policy" not in (self.data.get("models") or {}):
            return None
        names = Names(self.policy, self.names[self.start])
        return conclude(self.data, self.start, names, self.judges, self.benchmarks)

    def reward_model(self) -> str:
        """Table of held-out accuracy, with trivial judges as baselines."""
        model = self.data.get("reward_model") or {}
        if "accuracy" not in model:
            return ""
        members = model.get("members")
        rows = [(f"reward model 1 of {members}" if members else "reward model", model)]
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
        if "length_correlation" in model:
            found = f"{model['length_correlation']:+.2f}"
            lines += ["", f"Over these pairs, score and length correlate with {found}."]
        return "\n".join(lines)


def _interval(row: Mapping[str, Any], name: str) -> str:
    text = f"{100 * row[name]:.0f} %"
    if "low" in row and "high" in row:
        text += f" ({100 * row['low']:.0f} to {100 * row['high']:.0f} %)"
    return text
