"""The benchmarks as a table: base and final model in the lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_core.pipeline import recipe
from tasks.events import table_cell
from tasks.reporting.contamination import contamination
from tasks.reporting.files import read_json
from tasks.run import Run

STAGE = "lm_eval"
FILE = "lm_eval.json"


def benchmarks_digest(run: Run) -> str | None:
    """Digest of the run's benchmarks; None without any."""
    result = run.stages.get(STAGE)
    return result.digest if result else None


def benchmarks_of(run: Run) -> str:
    """The run's benchmarks in Markdown; empty without any."""
    digest = benchmarks_digest(run)
    if digest is None:
        return ""
    return Benchmarks(
        read_json(run.store, digest, FILE), recipe.policy_label(run.config)
    ).markdown()


@dataclass(frozen=True)
class Benchmarks:
    """lm_eval.json; rlhf_core/evaluation/harness/stage.py has its schema."""

    data: Mapping[str, Any]
    policy: str = "PPO"

    def markdown(self) -> str:
        """A table with a row per metric of each task in the settings."""
        rows = [self._row(task, key) for task, key in self._metrics()]
        if not rows:
            return "No benchmark has a result."
        head = f"| task | metric | examples | few-shot | base | {self.policy} | difference |"
        lines = [head, "| --- | --- | ---: | ---: | ---: | ---: | ---: |", *rows]
        note = (
            "Values ± standard errors; ↑ higher is better, ↓ lower is better. If the metric is a "
            "mean, the error of a difference is paired over the same examples. Measured with "
            f"lm-eval {self.data.get('lm_eval', '?')}."
        )
        return "\n\n".join(filter(None, ["\n".join(lines), note, self.known()]))

    def known(self) -> str:
        """How many of the questions are in the training data; "" if nobody looked."""
        found = {
            f"{task} in {data_set}": row
            for task, data_sets in (self.data.get("contamination") or {}).items()
            for data_set, row in data_sets.items()
        }
        return contamination(found, "questions")

    def _metrics(self) -> Iterator[tuple[str, str]]:
        models = self.data.get("models") or {}
        for task in self.data.get("shown") or []:
            for key in (models.get("policy") or {}).get(task) or {}:
                yield task, key

    def _row(self, task: str, key: str) -> str:
        about = (self.data.get("tasks") or {}).get(task) or {}
        models = self.data.get("models") or {}
        cells = [
            table_cell(task),
            table_cell(key.removesuffix(",none")) + _arrow(about, key.partition(",")[0]),
            _count(about),
            str(about.get("num_fewshot", "–")),
            *(_pm(((models.get(m) or {}).get(task) or {}).get(key)) for m in ("base", "policy")),
            _pm(((self.data.get("change") or {}).get(task) or {}).get(key), signed=True),
        ]
        return f"| {' | '.join(cells)} |"


def _arrow(about: Mapping[str, Any], metric: str) -> str:
    higher = (about.get("higher_is_better") or {}).get(metric)
    return "" if higher is None else " ↑" if higher else " ↓"


def _count(about: Mapping[str, Any]) -> str:
    n, of = about.get("n"), about.get("of")
    if n is None:
        return "–"
    return f"{n:,} of {of:,}" if of is not None and of != n else f"{n:,}"


def _pm(row: Mapping[str, Any] | None, signed: bool = False) -> str:
    value, error = (row or {}).get("value"), (row or {}).get("stderr")
    if value is None:
        return "–"
    shown = f"{value:+.4g}" if signed else f"{value:.4g}"
    return shown if error is None else f"{shown} ± {error:.2g}"
