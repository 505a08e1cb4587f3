"""The run's record, however the run ends."""

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from rlhf_core.errors import DataError, StoreUnavailable
from rlhf_core.jobs import ModelSettings, PipelineConfig
from tasks.events import seconds
from tasks.run import Run, StageResult, new_run_id, recorded
from tasks.stages import job_fields


@pytest.fixture
def run(tmp_path, monkeypatch, store):
    monkeypatch.setenv("RLHF_HOME", str(tmp_path))
    return Run(PipelineConfig(), "20260101-000000-abcd", store)


RESULT = StageResult(stage="sft", digest="1" * 64, kind="model", key="k", reused=True, seconds=0.1)


def record(run):
    return run.store.read_record("runs/20260101-000000-abcd.json")


def test_record_grows_with_the_stages(run):
    with recorded(run):
        assert record(run)["state"] == "running"
        run.add(RESULT)
        assert record(run)["stages"]["sft"]["reused"] is True
    assert record(run)["state"] == "completed"
    assert record(run)["ended"] is not None


def test_failure_is_recorded_with_its_category(run):
    with pytest.raises(DataError), recorded(run):
        raise DataError("row 7 is empty")
    found = record(run)
    assert (found["state"], found["error"], found["category"]) == (
        "failed", "row 7 is empty", "data",
    )  # fmt: skip


def test_cancel_is_recorded(run):
    with pytest.raises(KeyboardInterrupt), recorded(run):
        raise KeyboardInterrupt
    assert record(run)["state"] == "cancelled"


def test_store_that_goes_away_does_not_hide_the_error(run, monkeypatch):
    def away(*arguments, **options):
        raise StoreUnavailable("gone")

    with pytest.raises(DataError), recorded(run):
        monkeypatch.setattr(run.store, "write_record", away)
        raise DataError("row 7 is empty")


def test_retried_run_keeps_its_start_and_loses_its_error(run):
    with pytest.raises(DataError), recorded(run):
        raise DataError("x")
    started = record(run)["started"]
    with recorded(Run(run.config, run.id, run.store)):
        pass
    assert (record(run)["started"], record(run)["error"]) == (started, None)


def test_run_id_is_the_same_for_the_same_flow_run():
    from datetime import UTC, datetime

    when = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert new_run_id("abcdef12-3456", when) == "20260102-030405-abcdef12"


def test_seconds_are_readable():
    assert [seconds(x) for x in (0.04, 9.9, 42.4, 200, 4000)] == [
        "0.0 s", "9.9 s", "42 s", "3 min 20 s", "1 h 6 min",
    ]  # fmt: skip


def test_training_stages_are_told_of_the_quantisation(tmp_path, store):
    model = ModelSettings(source="random:llama", quantization="nf4")
    run = Run(PipelineConfig(model=model), "20260101-000000-abcd", store)
    assert job_fields(run, run.config.ppo)["quantization"] == "nf4"
    assert "quantization" not in job_fields(run, run.config.evaluate)


def test_training_jobs_are_told_which_weights_to_publish(run):
    config = {"publish": {"select": "last"}}
    run.config = PipelineConfig.model_validate(config)
    for section in (run.config.sft, run.config.dpo, run.config.ppo):
        assert job_fields(run, section)["select"] == "last"
    for section in (run.config.reward, run.config.evaluate):
        assert "select" not in job_fields(run, section)


def test_server_that_ends_with_the_run_has_no_page_for_it(store):
    config, flow_run = PipelineConfig(), "0e5b6a3c-98a2-4c56-8a3c-1f9a2f8a7a10"
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:4200/api"}):
        page = Run(config, "x", store, flow_run).page
        assert page == f"http://127.0.0.1:4200/runs/flow-run/{flow_run}"
        assert Run(config, "x", store, flow_run, lasting=False).page is None
