"""SIGTERM in a process with the rank's handlers; no torch, no ranks."""

import json
import signal
import subprocess
import sys
import time

import pytest

PROGRAM = """
import sys, time
from pathlib import Path
from rlhf_core.runtime.stopping import stop
stop.install()
stop.phase, stop.folder = sys.argv[1], Path(sys.argv[2])
stop.seconds = 60.0 if stop.phase == "idle" else 1.5
if sys.argv[3] == "uploading":
    until = time.monotonic() + 0.6
    stop.uploading = lambda: time.monotonic() < until
def stuck():
    print("ready", flush=True)
    while not (sys.argv[3] == "asks" and stop.requested):
        time.sleep(0.05)
stuck()
print("left the loop", flush=True)
"""


@pytest.fixture
def rank(tmp_path):
    started = []

    def start(phase, what="stuck", number=signal.SIGTERM):
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, phase, str(tmp_path), what],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        began = time.monotonic()
        out, err = process.communicate(timeout=100)
        path = tmp_path / "error-0.json"
        error = json.loads(path.read_text()) if path.exists() else {}
        return process.returncode, time.monotonic() - began, out, err, error

    yield start
    for process in started:
        process.kill()


def test_idle_process_leaves_at_once(rank):
    code, took, _, err, error = rank("idle")
    assert (code, err, error["category"]) == (1, "", "preempted")
    assert error["message"] == "stopped by SIGTERM"
    assert took < 40, "and not when its time is up"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_loop_that_asks_goes_on_to_its_end(rank, number):
    code, _, out, _, error = rank("training", "asks", number)
    assert (code, out, error) == (0, "left the loop\n", {})


def test_loop_that_does_not_ask_is_ended_with_its_stack_shown(rank):
    code, took, _, err, error = rank("training")
    assert (code, error["category"]) == (1, "preempted")
    assert took > 1.4
    assert "rank 0, thread MainThread:" in err
    assert "in stuck" in err


def test_upload_is_waited_for(rank):
    assert 0.5 < rank("idle", "uploading")[1] < 40


def test_upload_that_does_not_end_is_told(rank):
    _, took, _, err, error = rank("leaving")
    assert took > 1.4
    assert "before the upload had finished; it had 1.5 s (stop_timeout)" in error["message"]
    assert err == ""


@pytest.mark.parametrize(("category", "shown"), [("judge", False), ("internal", True)])
def test_stacks_are_not_shown_where_another_rank_has_told_a_user_why(
    rank, tmp_path, category, shown
):
    """An error of a rank ends the others: their stacks would hide its message."""
    told = {"category": category, "message": "The reward service failed.", "time": 1.0}
    (tmp_path / "error-1.json").write_text(json.dumps(told))
    _, _, _, err, _ = rank("training")
    assert ("Python stack" in err) == shown
