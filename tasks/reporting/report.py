"""The report of a run: stages, curves, evaluation, replies before and after training."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import yaml
from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from rlhf_core.jobs import OnlineSettings
from rlhf_core.pipeline import recipe
from rlhf_core.store import registry
from rlhf_core.system.private import private_folder
from rlhf_core.system.secrets import redact
from tasks.events import headline, log_event, seconds, table_cell
from tasks.reporting import lineage, origins
from tasks.reporting.benchmarks import benchmarks_of
from tasks.reporting.contamination import known_prompts
from tasks.reporting.cost import HEADS, cells, cost, reused
from tasks.reporting.curves import draw, read_metrics
from tasks.reporting.differences import changed
from tasks.reporting.evaluation import comparison_of, evaluation_of, read_samples
from tasks.reporting.markdown import embedded, folded, page, sample_table
from tasks.reporting.mixtures import mixtures
from tasks.reporting.model_card import data_card
from tasks.reporting.rollouts import rollouts
from tasks.run import Run

CURVES, LINEAGE = "curves.png", "lineage.svg"
# What a judge counts while it labels -> what it is; see docs/data.md.
COUNTED = {
    "judge_requests": "requests to the judge",
    "judge_tokens": "tokens of the judge",
    "judge_agreed": "ties in both orders",
    "judge_by_position": "verdicts that changed with the order",
    "judge_half": "won in one order and tied in the other",
    "judge_identical": "equal replies that needed no judge",
    "judge_unclear": "questions without a verdict",
    "train_too_close": "comparisons too close for a pair",
    "heldout_too_close": "held-out comparisons too close for a pair",
}
LONGEST_CARD = 8000  # characters of a data card


@task(name="report", task_run_name="report", cache_policy=NO_CACHE, persist_result=False)
def report(run: Run) -> None:
    """Write report.md, report.html and their images to the run's folder, and a Prefect artifact."""
    began = time.monotonic()
    found = origins.known(run)
    images = {LINEAGE: lineage.draw(origins.nodes(run, found)).encode()}
    curves = draw({name: read_metrics(run.store, r.digest) for name, r in run.stages.items()})
    if curves is not None:
        images[CURVES] = curves
    sources = origins.made_from(run, found)
    markdown = whole = render(run, images, sources)
    private_folder("runs")
    run.folder.mkdir(parents=True, exist_ok=True)
    for name, content in images.items():
        (run.folder / name).write_bytes(content)
        kind = "png" if name == CURVES else "svg+xml"
        whole = whole.replace(f"]({name})", f"]({embedded(content, kind)})")
    run.report = run.folder / "report.md"
    run.report.write_text(markdown, encoding="utf-8")
    (run.folder / "report.html").write_text(page(run.config.name, whole), encoding="utf-8")
    create_markdown_artifact(whole, key="report", description=f"Report of run {run.id}")
    drawn = f"![what was made from what]({embedded(images[LINEAGE], 'svg+xml')})"
    create_markdown_artifact(
        f"{drawn}\n\n{sources}", key="lineage",
        description=f"The data and models that the model of run {run.id} was made from",
    )  # fmt: skip
    log_event(
        get_run_logger(), "note", "report", f"{run.report} ({seconds(time.monotonic() - began)})"
    )


def render(run: Run, images: Mapping[str, bytes], sources: str = "") -> str:
    """The report in Markdown.

    Args:
        images: files that it refers to, by their names.
        sources: table of what the model was made from.
    """
    parts = [f"# {run.config.name}", _facts(run), "## Stages", _stages(run)]
    if CURVES in images:
        parts += ["## Curves", f"![training curves]({CURVES})"]
    if measured := rollouts(run):
        parts += ["## Rollouts", *measured]
    if "evaluate" in run.stages:
        digest = run.stages["evaluate"].digest
        evaluation = evaluation_of(run, digest)
        parts += ["## Evaluation", *filter(None, [evaluation.models(), evaluation.win_rates()])]
        parts += [text for text in [evaluation.verdict(), _episodes(run)] if text]
        if beside := comparison_of(run):
            found = [_champion(run), beside.models(), beside.win_rates(), beside.verdict()]
            parts += ["## Champion and challenger", *filter(None, found)]
        if known := known_prompts(evaluation.data):
            parts += ["## Held-out prompts in the training data", known]
        if text := evaluation.reward_model():
            parts += ["## Reward model", text]
        samples = read_samples(run.store, digest)[: run.config.evaluate.samples]
        if samples:
            parts += [
                "## Replies before and after",
                *(sample_table(s, evaluation.names) for s in samples),
            ]
    if benchmarks := benchmarks_of(run):
        parts += ["## Benchmarks", benchmarks]
    if LINEAGE in images:
        parts += ["## Lineage", f"![what was made from what]({LINEAGE})"]
        parts += [sources] if sources else []
    if found := mixtures(run):
        parts += ["## Mixtures", *found]
    if cards := _data_cards(run):
        parts += ["## Data", *cards]
    settings = redact(yaml.safe_dump(changed(run.config), sort_keys=False, allow_unicode=True))
    parts += ["## Settings", folded("what differs from the defaults", settings)]
    return "\n\n".join(parts) + "\n"


def _episodes(run: Run) -> str:
    """That the evaluation lacks the environment of the training, if there was one."""
    sections = [recipe.section(run.config, stage) for stage in run.config.stages]
    online = [section.environment for section in sections if isinstance(section, OnlineSettings)]
    trained = [environment.type for environment in online if environment is not None]
    if not trained:
        return ""
    return (
        f"The model was trained in episodes with the environment {trained[-1]}. These numbers are "
        "of single replies without it; how the episodes went is under Rollouts."
    )


def _facts(run: Run) -> str:
    name = f"[{run.id}]({run.page})" if run.page else f"`{run.id}`"
    lines = [
        f"Run {name} of {table_cell(run.author)}, started {run.started}, base model "
        f"`{run.config.model.source}`, store `{run.store.url}`."
    ]
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


def _champion(run: Run) -> str:
    """Which run made the champion that the model is compared with."""
    name, policy = run.config.publish.name, run.store.get(run.stages["compare"].digest)
    compared = (policy.metadata.get("job") or {}).get("sft")
    for version in reversed(registry.read_model(run.store, name).versions):
        if compared and run.store.get(version.digest).metadata.get("policy") == compared:
            other = run.store.read_record(f"runs/{version.run}.json") if version.run else None
            link = (other or {}).get("page")
            shown = f"[{version.run}]({link})" if link else f"`{version.run or 'unknown'}`"
            text = f"The champion is version {version.number} of `{name}`, made by run {shown}."
            beside = f" Side by side: `rlhf compare {version.run} {run.id}`." if version.run else ""
            return text + beside
    return ""


def _stages(run: Run) -> str:
    """What each stage took and gave; columns without an entry are left out."""
    price, results = run.config.gpu_hour_price, list(run.stages.values())
    rows = []
    for name, result in run.stages.items():
        took = cells(cost([result], price))
        if result.reused:
            took = [reused(result), "", "", ""]
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
    """How many rows of a data set were dropped, or pairs left out, and why."""
    kept = ("read", "kept", "pairs", "prompts", "train_replies", "heldout_replies")
    counts = {k: v for k, v in metrics.items() if isinstance(v, int) and not k.endswith(kept)}
    told = ((n, COUNTED.get(reason) or reason.replace("_", " ")) for reason, n in counts.items())
    return ", ".join(f"{n:,} {reason}" for n, reason in told if n)


def _data_cards(run: Run) -> list[str]:
    """The card of each data set, folded."""
    found = []
    for name, result in run.stages.items():
        if result.kind != "dataset":
            continue
        if card := data_card(run.store, run.store.get(result.digest)):
            text = json.dumps(card, indent=1, ensure_ascii=False, sort_keys=True)
            if len(text) > LONGEST_CARD:
                rest = f"the whole card: rlhf artifacts pull {result.ref} FOLDER"
                text = f"{text[:LONGEST_CARD]}…\n{rest}"
            found.append(folded(f"{name}: {headline(result.metrics)}", text))
    return found
