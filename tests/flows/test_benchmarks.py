"""The whole pipeline with benchmarks, for real: `rlhf run --preset smoke` with lm_eval set."""

import json
from pathlib import Path

import pytest

from tests.flows.test_smoke import AFTER, BEFORE_PPO, Pipeline
from tests.rlhf_core.evaluation.harness.own_tasks import write_tasks

pytestmark = [pytest.mark.extras, pytest.mark.slow, pytest.mark.timeout(900)]
pytest.importorskip("lm_eval", reason="needs lm-eval; run: make test-extras")


def test_smoke_with_benchmarks_reports_both_models(prefect_server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    pipeline = Pipeline(tmp_path, prefect_server)
    write_tasks(tmp_path / "own")
    asked = "lm_eval={tasks: [own_choice, own_words], include_path: own}"
    record, _ = pipeline.run(asked, timeout=600)
    assert set(record["stages"]) == {*BEFORE_PPO, *AFTER, "lm_eval"}
    folder = Path(record["folder"])

    numbers = json.loads(
        pipeline.store.read_bytes(record["stages"]["lm_eval"]["digest"], "lm_eval.json")
    )
    assert list(numbers["models"]) == ["base", "policy"]
    accuracy = numbers["models"]["base"]["own_choice"]["acc,none"]["value"]
    assert round(12 * accuracy) == pytest.approx(12 * accuracy), "a share of 12 questions"
    table = (folder / "report.md").read_text().split("## Benchmarks")[1]
    assert "| task | metric | examples | few-shot | base | PPO | difference |" in table
    assert f"| own\\_choice | acc ↑ | 12 | 0 | {accuracy:.4g} ± " in table
    assert "| own\\_words | exact\\_match ↑ | 5 | 0 | " in table
    assert "## Benchmarks" in (tmp_path / ".rlhf/published/smoke/README.md").read_text()

    log = (folder / "lm_eval/log.txt").read_text()
    assert "policy: 36 of 36 loglikelihood requests" in log
    for noise in ("%|", "it/s", "examples/s", "Traceback", "WARNING", "lm-eval:"):
        assert noise not in log, log

    again, _ = pipeline.run(asked)
    assert all(stage["reused"] for stage in again["stages"].values())
