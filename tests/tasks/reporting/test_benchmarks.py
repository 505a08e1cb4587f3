"""Benchmarks in the report, on the model card, in one line, and in a published model's identity."""

import json

import pytest

from rlhf_core.pipeline.presets import build_config
from tasks.events import headline
from tasks.publish import make_artifact, publish_key
from tasks.reporting.benchmarks import Benchmarks
from tasks.reporting.model_card import model_card
from tasks.reporting.report import render
from tasks.run import Run, StageResult


def row(value, stderr=None):
    return {"value": value, "stderr": stderr}


NUMBERS = {
    "lm_eval": "0.4.13",
    "shown": ["arc_easy", "own|text"],
    "tasks": {
        "arc_easy": {"n": 100, "of": 2376, "num_fewshot": 0, "higher_is_better": {"acc": True}},
        "own|text": {"n": 5, "of": 5, "num_fewshot": 2, "higher_is_better": {"ppl": False}},
    },
    "models": {
        "base": {"arc_easy": {"acc,none": row(0.5, 0.05)}, "own|text": {"ppl,get": row(None)}},
        "policy": {"arc_easy": {"acc,none": row(0.375, 0.04)}, "own|text": {"ppl,get": row(7.25)}},
    },
    "change": {"arc_easy": {"acc,none": row(-0.125, 0.03)}},
}
ARC = "| arc\\_easy | acc ↑ | 100 of 2,376 | 0 | 0.5 ± 0.05 | 0.375 ± 0.04 | -0.125 ± 0.03 |"


@pytest.fixture
def run(tmp_path, monkeypatch, store):
    monkeypatch.setenv("RLHF_HOME", str(tmp_path / "home"))
    run = Run(build_config("smoke", ["lm_eval.tasks=[arc_easy]"]), "run-1", store)
    weights = {"config.json": b"{}", "model.safetensors": b"w"}
    run.policy = add(run, "ppo", "model", weights)
    run.evaluation = add(run, "evaluate", "evaluation", {"evaluation.json": b"{}"})
    return run


def add(run, stage, kind, files):
    artifact = run.store.publish_derived(kind=kind, files=files)
    run.stages[stage] = StageResult(
        stage=stage, digest=artifact.digest, kind=kind, key="", reused=False, seconds=1
    )
    return artifact.digest


def benchmarks(run, numbers=NUMBERS):
    return add(run, "lm_eval", "benchmarks", {"lm_eval.json": json.dumps(numbers).encode()})


def test_table_has_both_models_and_what_changed():
    text = Benchmarks(NUMBERS, "DPO").markdown()
    assert text.startswith("| task | metric | examples | few-shot | base | DPO | difference |\n")
    assert ARC in text
    assert "| own\\|text | ppl,get ↓ | 5 | 2 | – | 7.25 | – |" in text
    assert "Measured with lm-eval 0.4.13." in text


def test_report_and_model_card_show_the_table(run):
    assert "## Benchmarks" not in render(run, images={})
    benchmarks(run)
    for text in (
        render(run, images={}),
        model_card(run, "smoke", run.policy, run.evaluation),
    ):
        assert "## Benchmarks" in text
        assert ARC in text


def test_artifact_without_numbers_is_said_to_have_none(run):
    benchmarks(run, {})
    assert "No benchmark has a result." in render(run, images={})


def test_published_model_is_made_from_its_benchmarks(run):
    digest = benchmarks(run)
    artifact = make_artifact(run, "smoke", run.policy, run.evaluation)
    assert artifact.metadata["lm_eval"] == digest
    assert digest in artifact.parents
    assert publish_key("a", "p", "e", "b") != publish_key("a", "p", "e")


def test_headline_has_the_first_metric_of_each_task():
    assert headline(NUMBERS) == "arc_easy acc 0.5 → 0.375"
