"""What is drawn of events and of other log records."""

import io
import logging

import pytest
from prefect.exceptions import FailedRun, TerminationSignal

from flows.cli.console import Console
from rlhf_core.errors import DataError
from tasks.events import PrefectsOwn, headline, log_event


class Text(io.StringIO):
    encoding = "utf-8"


@pytest.fixture
def shown():
    out = Text()
    log = logging.getLogger("prefect.task_runs.test")
    log.handlers, log.propagate = [Console(out)], False
    log.setLevel(logging.INFO)

    def get():
        return out.getvalue().splitlines()

    get.log = log
    return get


def test_stage_is_one_line_with_time_artifact_and_numbers(shown):
    fields = {"reused": False, "seconds": 12.3, "ref": "model/ab", "metrics": {"loss": 1.25}}
    log_event(shown.log, "done", "sft", "done", **fields)
    log_event(shown.log, "done", "ppo", "reused", **{**fields, "reused": True})
    assert shown() == [
        "✓ sft             12 s         model/ab                     loss 1.25",
        "= ppo             reused       model/ab                     loss 1.25",
    ]


def test_progress_in_a_file_is_a_line_now_and_then(shown):
    for step in range(5):
        log_event(shown.log, "progress", "sft", f"step {step}/5")
    assert shown() == ["  sft             step 0/5"]


def test_prefects_own_records_are_not_shown(shown):
    shown.log.error("Finished in state Failed()")
    shown.log.info("Beginning")
    assert shown() == []


def test_warnings_of_others_are_shown(shown):
    Console.emit(shown.log.handlers[0], logging.makeLogRecord(
        {"name": "rlhf_core.store", "levelno": logging.WARNING, "msg": "slow"}
    ))  # fmt: skip
    assert shown() == ["  rlhf_core.store: slow"]


def test_expected_errors_lose_their_traceback():
    record = logging.makeLogRecord({"exc_info": (DataError, DataError("row 7"), None), "msg": "x"})
    PrefectsOwn().filter(record)
    assert (record.exc_info, record.getMessage()) == (None, "row 7")


def test_unexpected_errors_keep_it():
    record = logging.makeLogRecord({"exc_info": (KeyError, KeyError("x"), None), "msg": "x"})
    PrefectsOwn().filter(record)
    assert record.exc_info is not None


def test_failed_state_is_not_logged_twice():
    record = logging.makeLogRecord({"exc_info": (FailedRun, FailedRun("x"), None), "msg": "x"})
    assert not PrefectsOwn().filter(record)


@pytest.mark.parametrize(
    ("metrics", "text"),
    [
        ({"read": 2000, "kept": 48}, "48 of 2,000 rows"),
        ({"train_pairs": 19, "heldout_pairs": 6}, "19 pairs, 6 held out"),
        ({"loss": 1.23456, "tokens_per_second": 1234.5}, "loss 1.23  1,234 tokens/s"),
        (
            {"heldout": {"accuracy": 0.7, "low": 0.6, "high": 0.8}},
            "held-out accuracy 0.70 (0.60 to 0.80)",
        ),
        (
            {"models": {"sft": {"gold_mean": 0.1}, "policy": {"gold_mean": 0.4}}},
            "gold 0.100 → 0.400",
        ),
        ({"train_replies": 3, "heldout_replies": 2}, "3 replies kept, 2 held out"),
        ({"best": {"step": 40, "within": True}, "kl": 2.0}, "best at step 40  KL 2"),
        ({"best": {"step": 8, "within": False}}, "best at step 8, above kl_budget"),
        ({}, ""),
    ],
)  # fmt: skip
def test_headline_picks_the_telling_numbers(metrics, text):
    assert headline(metrics) == text


@pytest.mark.parametrize(
    ("message", "kept"),
    [
        ("Beginning subflow run 'sft of x' for flow 'rlhf-job'", False),
        ("Worker 'gpu-1' submitting flow run '94a3'", False),
        ("All deployment steps completed successfully", False),
        ("Finished in state Completed('model/904e')", False),
        ("Finished in state Crashed('Execution was aborted by a termination signal.')", False),
        ("Finished in state DataError('no column prompt', type=FAILED)", True),
        ("sft: done in 8.5 s", True),
    ],
)
def test_what_prefect_logs_about_every_run_is_dropped(message, kept):
    record = logging.LogRecord("prefect.flow_runs", logging.INFO, "", 0, message, (), None)
    assert PrefectsOwn().filter(record) is kept


def test_cancelled_run_is_not_called_a_crash():
    def said(error):
        record = logging.LogRecord("x", logging.ERROR, "", 0, "Crash detected! gone", (), None)
        try:
            raise error
        except BaseException:
            PrefectsOwn().filter(record)
        return record.levelname, record.getMessage()

    cancelled = TerminationSignal(signal=15)
    assert said(cancelled) == ("INFO", "stopped by a signal: cancelled, or its machine stops")
    assert said(MemoryError()) == ("ERROR", "Crash detected! gone")
