"""The mirror in MLflow: a real database of its own, and a server that is away."""

import json
import logging
from pathlib import Path

import pytest
from pydantic import ValidationError

from rlhf_core.jobs.tracking import MlflowTracking
from rlhf_core.pipeline.presets import build_config
from rlhf_core.preflight.check import check
from rlhf_core.store import registry
from tasks import tracking
from tasks.observers import observed
from tasks.run import Run, StageResult

LOG = logging.getLogger("test")
STUB = Path(__file__).parent / "stubs/rlhf_stub"


def test_uri_with_credentials_is_refused_because_it_would_be_written_down():
    with pytest.raises(ValidationError, match="MLFLOW_TRACKING_PASSWORD"):
        MlflowTracking(uri="https://me:marked-secret@mlflow.example:5000")


def test_missing_package_is_found_before_anything_is_trained(monkeypatch, tmp_path):
    known = check.__globals__["find_spec"]
    monkeypatch.setitem(
        check.__globals__, "find_spec", lambda name: None if name == "mlflow" else known(name)
    )
    config = build_config("smoke", [f"store={tmp_path}", "tracking={uri: 'http://localhost:5000'}"])
    assert [p for p in check(config) if 'pip install "rlhf-pipeline[mlflow]"' in p]


def test_parameters_are_what_differs_from_the_defaults(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "marked-secret")
    found = tracking.parameters(
        build_config({}, ["ppo.kl_coef=0.3", "author=marked-secret", "tracking={uri: x}"])
    )
    assert found == {"ppo.kl_coef": "0.3", "author": "***"}


def run_on(store, uri, name="run-1", *more):
    return Run(build_config("smoke", [f"tracking={{uri: '{uri}'}}", *more]), name, store)


def add(run, stage, kind, files, metrics=None):
    artifact = run.store.publish_derived(kind=kind, files=files)
    run.add(
        StageResult(
            stage=stage, digest=artifact.digest, kind=kind, key="", reused=False, seconds=9,
            work={"seconds": 3.0, "gpus": 2}, metrics=metrics or {},
        )
    )  # fmt: skip
    return artifact


def pipeline(run):
    """What a flow does inside the block, and the model's version."""
    run.begin()
    lines = [{"step": s, "total": 3, "loss": 4.0 - s} for s in (1, 2, 3)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    add(run, "sft", "model", {"metrics.jsonl": text.encode(), run.id: b""}, {"loss": 1.0})
    add(run, "evaluate", "evaluation", {"evaluation.json": STUB / "evaluation.json"})
    run.verdict = {"state": "better", "text": "PPO over SFT"}
    run.folder.mkdir(parents=True)
    (run.folder / "report.md").write_text("# the report")
    (run.folder / "lineage.svg").write_text("<svg/>")  # which the report shows
    made = add(run, "publish", "published", {"README.md": f"# card of {run.id}".encode()})
    registry.promote(run.store, "smoke", made.digest)
    run.version = {"name": "smoke", "number": 1, "digest": made.digest, "state": "champion"}
    return made


@pytest.mark.extras
def test_run_its_numbers_report_and_model_are_in_mlflow(tmp_path, store, monkeypatch, caplog):
    from mlflow.telemetry.utils import is_telemetry_disabled

    monkeypatch.setenv("RLHF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)  # where MLflow keeps the artifacts of such a database
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run = run_on(store, uri, "run-1", "ppo.kl_coef=0.3")
    with observed(run, LOG):
        first = pipeline(run)
    assert is_telemetry_disabled()
    client = tracking.connect(uri)
    experiment = client.get_experiment_by_name("rlhf").experiment_id
    [found] = client.search_runs([experiment])
    assert (found.info.status, found.info.run_name) == ("FINISHED", "smoke")
    assert found.data.params["ppo.kl_coef"] == "0.3"
    assert found.data.tags["rlhf.verdict"] == "better"
    assert found.data.metrics["sft/gpu_hours"] == pytest.approx(6 / 3600)
    steps = client.get_metric_history(found.info.run_id, "sft/loss")
    assert [(m.step, m.value) for m in steps if m.step] == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert {f.path for f in client.list_artifacts(found.info.run_id)} == {
        "evaluation.json", "lineage.svg", "model_card", "report.md",
    }  # fmt: skip
    version = client.get_model_version_by_alias("smoke", "champion")
    assert version.tags["rlhf.digest"] == first.digest and version.run_id == found.info.run_id

    second = run_on(store, uri, "run-2")
    with pytest.raises(ZeroDivisionError), observed(second, LOG):
        pipeline(second)
        raise ZeroDivisionError
    with observed(second, LOG):  # retried: it goes on
        pass
    found = client.search_runs([experiment])
    assert sorted(r.data.tags["rlhf.run"] for r in found) == ["run-1", "run-2"]
    champion = client.get_model_version_by_alias("smoke", "champion")
    assert int(champion.version) == len(client.search_model_versions("name = 'smoke'")) == 2
    assert [r for r in caplog.records if "MLflow" in r.getMessage()] == []


@pytest.mark.extras
def test_server_that_is_away_is_said_once_and_fails_nothing(tmp_path, store, monkeypatch, caplog):
    monkeypatch.setenv("RLHF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = run_on(store, "http://127.0.0.1:9")
    with observed(run, LOG):
        pipeline(run)
    [said] = [r.getMessage() for r in caplog.records if "MLflow" in r.getMessage()]
    assert said.startswith("tracking: MLflow at http://127.0.0.1:9 failed: ")
    assert said.endswith("The run goes on without it.")
