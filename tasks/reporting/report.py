"""The report of a run: stages, curves, evaluation, replies before and after training."""

from __future__ import annotations

import base64
import html
import json
import re
import time
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from rlhf_core.errors import ConfigError, StoreError
from rlhf_core.store import Store
from tasks.events import headline, log_event, seconds, table_cell
from tasks.reporting.benchmarks import benchmarks_of
from tasks.reporting.contamination import known_prompts
from tasks.reporting.cost import HEADS, cells, cost
from tasks.reporting.curves import draw
from tasks.reporting.evaluation import comparison_of, evaluation_of, read_samples
from tasks.run import Run

CURVES = "curves.png"


@task(name="report", task_run_name="report", cache_policy=NO_CACHE, persist_result=False)
def report(run: Run) -> None:
    """Write report.md, report.html and curves.png to the run's folder, and a Prefect artifact."""
    began = time.monotonic()
    curves = draw({name: read_metrics(run.store, r.digest) for name, r in run.stages.items()})
    markdown = render(run, has_curves=curves is not None)
    run.folder.mkdir(parents=True, exist_ok=True)
    embedded = markdown
    if curves is not None:
        (run.folder / CURVES).write_bytes(curves)
        data = base64.b64encode(curves).decode()
        embedded = markdown.replace(f"({CURVES})", f"(data:image/png;base64,{data})")
    run.report = run.folder / "report.md"
    run.report.write_text(markdown, encoding="utf-8")
    (run.folder / "report.html").write_text(page(run.config.name, embedded), encoding="utf-8")
    create_markdown_artifact(
        f"{embedded}\n## Lineage\n\n{lineage(run)}\n",
        key="report",
        description=f"Report of run {run.id}",
    )
    log_event(
        get_run_logger(), "note", "report", f"{run.report} ({seconds(time.monotonic() - began)})"
    )


def render(run: Run, has_curves: bool) -> str:
    """The report in Markdown; it refers to the file with the curves."""
    parts = [f"# {run.config.name}", _facts(run), "## Stages", _stages(run)]
    if has_curves:
        parts += ["## Curves", f"![training curves]({CURVES})"]
    if "evaluate" in run.stages:
        digest = run.stages["evaluate"].digest
        evaluation = evaluation_of(run, digest)
        parts += ["## Evaluation", *filter(None, [evaluation.models(), evaluation.win_rates()])]
        parts += [text for text in [evaluation.verdict()] if text]
        if beside := comparison_of(run):
            found = [beside.models(), beside.win_rates(), beside.verdict()]
            parts += ["## Champion and challenger", *filter(None, found)]
        if known := known_prompts(evaluation.data):
            parts += ["## Held-out prompts in the training data", known]
        if text := evaluation.reward_model():
            parts += ["## Reward model", text]
        samples = read_samples(run.store, digest)[: run.config.evaluate.samples]
        if samples:
            parts += [
                "## Replies before and after",
                *(_sample(s, evaluation.names) for s in samples),
            ]
    if benchmarks := benchmarks_of(run):
        parts += ["## Benchmarks", benchmarks]
    return "\n\n".join(parts) + "\n"


def lineage(run: Run) -> str:
    """Lineage of the run's artifacts as a Mermaid graph, which Prefect's pages render."""
    names = {result.digest: name for name, result in run.stages.items()}
    lines = ["```mermaid", "flowchart LR"]
    for name, result in run.stages.items():
        lines.append(f'  {name}["{name}<br/>{result.ref}"]')
        parents = run.store.get(result.digest).parents
        lines += [f"  {names[p]} --> {name}" for p in dict.fromkeys(parents) if p in names]
    return "\n".join([*lines, "```"])


def _facts(run: Run) -> str:
    name = f"[{run.id}]({run.page})" if run.page else f"`{run.id}`"
    lines = [f"Run {name}, base model `{run.config.model.source}`, store `{run.store.url}`."]
    if run.model_folder is not None:
        lines.append(
            f"The model is published as `{run.config.publish.name}` in `{run.model_folder}`; "
            f"chat with it: `rlhf chat {run.config.publish.name}`."
        )
    if run.version and run.version["state"] != "champion":
        name, number = run.version["name"], run.version["number"]
        lines.append(
            f"The model is version {number} of `{name}`, a candidate and not the champion: "
            f"{table_cell(run.version['reason'], 2000)}"
        )
        lines.append(f"To promote it by hand: `rlhf models promote {name} {number}`.")
    return "\n\n".join(lines)


def _stages(run: Run) -> str:
    """What each stage took and gave; columns without an entry are left out."""
    price, results = run.config.gpu_hour_price, list(run.stages.values())
    rows = []
    for name, result in run.stages.items():
        took = cells(cost([result], price))
        if result.reused:
            made = result.work.get("seconds")
            took = ["reused" if made is None else f"reused ({seconds(made)})", "", "", ""]
        shown = headline(result.shown).replace("  ", ", ")
        if result.kind == "dataset" and (dropped := _dropped(result.metrics)):
            shown = f"{shown} ({dropped})" if shown else dropped
        rows.append([name, *took, shown, f"`{result.ref}`"])
    rows.append(["all", *cells(cost(results, price)), "", ""])
    kept = [c for c in range(len(rows[0])) if c not in range(2, 5) or any(r[c] for r in rows)]
    align = ["---", *["---:"] * len(HEADS), "---", "---"]
    lines = [["stage", *HEADS, "result", "artifact"], align, *rows]
    return "\n".join(f"| {' | '.join(line[c] for c in kept)} |" for line in lines)


def _dropped(metrics: dict[str, Any]) -> str:
    """How many rows of a data set were dropped, and why."""
    counts = {k: v for k, v in metrics.items() if isinstance(v, int) and k not in ("read", "kept")}
    return ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in counts.items() if n)


def _sample(sample: dict[str, Any], names: dict[str, str]) -> str:
    judges = [judge for judge in ("reward", "gold") if sample.get(judge)]
    rows = [
        f"> {table_cell(sample.get('prompt', ''))}",
        "",
        f"| | {' | '.join(['reply', *judges])} |",
    ]
    rows.append("| --- | --- |" + " ---: |" * len(judges))
    for name, label in names.items():
        if name in sample:
            scores = [sample[judge].get(name) for judge in judges]
            cells = ["" if score is None else f"{score:.2f}" for score in scores]
            rows.append(f"| {' | '.join([label, table_cell(sample[name]), *cells])} |")
            if greedy := (sample.get("greedy") or {}).get(name):
                rows.append(f"| {label}, greedy | {table_cell(greedy)} |" + " |" * len(judges))
    return "\n".join(rows)


def read_metrics(store: Store, digest: str) -> list[dict[str, Any]]:
    """The lines of an artifact's metrics.jsonl; [] when it has none."""
    try:
        text = store.read_bytes(digest, "metrics.jsonl").decode()
        return [json.loads(line) for line in text.splitlines() if line]
    except (ConfigError, StoreError, ValueError):
        return []


def page(title: str, markdown: str) -> str:
    """The report as a self-contained HTML page."""
    from markdown_it import MarkdownIt

    renderer = MarkdownIt("commonmark").enable("table")
    renderer.validateLink = _safe_link  # type: ignore[method-assign]
    body = renderer.render(markdown)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<meta name="viewport" content="width=device-width"><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #1f2937; background: #fff }}
table {{ border-collapse: collapse; margin: 1rem 0; font-size: .92rem }}
th, td {{ border-bottom: 1px solid #e5e7eb; padding: .35rem .7rem; text-align: left;
  vertical-align: top }}
th {{ background: #f9fafb }} img {{ max-width: 100% }}
code {{ background: #f3f4f6; padding: .1em .3em; border-radius: 4px; font-size: .88em }}
blockquote {{ border-left: 4px solid #2563eb; margin: 1.5rem 0 .3rem; padding: .1rem 1rem;
  background: #f9fafb }}
</style></head><body>
{body}</body></html>
"""


def _safe_link(url: str) -> bool:
    ours = url.startswith("data:image/png;base64,")
    return ours or not re.match(r"(?i)(javascript|data|file|vbscript):", url)
