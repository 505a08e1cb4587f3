"""`rlhf schedule`: cron lines, start times, and what a schedule would train."""

import pytest

from flows.cli.run import whole_paths
from flows.cli.schedule import check_cron, next_starts
from flows.schedule import trains
from rlhf_core.errors import ConfigError
from rlhf_core.pipeline.presets import build_config


@pytest.mark.parametrize(
    ("cron", "said"),
    [
        ("0 0 3 * * ?", "has 6 fields, expected five: minute hour"),  # Quartz: daily at three
        ("0 3 * * * 0", "Prefect would take the last one for seconds"),
        ("0 3 * *", "has 4 fields"),
        ("@daily", "has 1 fields"),
        ("0 30 * * *", "is not a cron line"),
        ("H 3 * * *", "is not a cron line"),
    ],
)
def test_cron_line_that_would_start_runs_at_other_times_is_refused(cron, said):
    with pytest.raises(ConfigError, match=r"--cron") as caught:
        check_cron(cron)
    assert said in str(caught.value)


def test_start_times_are_in_the_schedules_zone():
    check_cron("30 2 * * 1-5")
    found = next_starts("30 2 * * 1-5", "America/New_York")
    assert len(found) == 3
    for start in found:
        assert (start.hour, start.minute, start.second) == (2, 30, 0)
        assert start.weekday() < 5 and start.utcoffset().total_seconds() / 3600 in (-4, -5)


def test_schedule_says_what_it_would_train():
    config = build_config("dpo", ["data.sft.source=a.jsonl", "publish.name=chat"])
    said = trains(config)
    assert said.startswith(f"trains {config.model.source} (sft, dpo) on a.jsonl, ")
    assert said.endswith("for the name chat")


def test_settings_without_a_cron_line_start_nothing(rlhf):
    assert '--cron "minute hour' in rlhf("schedule", "--preset", "smoke", code=2).stderr


def test_paths_that_exist_here_are_whole_for_workers_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl", "demo"):
        (tmp_path / name).write_text("{}")
    sources = [{"source": "a.jsonl"}, {"source": "hub/name"}]
    settings = {
        "name": "demo",
        "data": {"sft": {"mix": sources}, "prompts": {"source": "./*.jsonl"}},
    }
    found = whole_paths(settings)
    assert found["name"] == "demo"
    assert [part["source"] for part in found["data"]["sft"]["mix"]] == [
        str(tmp_path / "a.jsonl"), "hub/name",
    ]  # fmt: skip
    assert found["data"]["prompts"]["source"] == str(tmp_path / "*.jsonl")
