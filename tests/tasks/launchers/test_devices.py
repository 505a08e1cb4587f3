"""Device locks between real processes."""

import subprocess
import sys
import time

import pytest

from rlhf_core.errors import ConfigError
from tasks.launchers.devices import devices, reserved

HOLD = """
import sys, time
from tasks.launchers.devices import reserved
with reserved(int(sys.argv[1]), sys.argv[2], print) as held:
    print(",".join(held), flush=True)
    time.sleep(60)
"""


@pytest.fixture
def hold(tmp_path, monkeypatch):
    """Starts a process that holds devices; returns it and which."""
    monkeypatch.setenv("RLHF_LOCKS", str(tmp_path))
    monkeypatch.setenv("RLHF_DEVICES", "0,1,2")
    started = []

    def start(count, owner):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(count), owner], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        return process, process.stdout.readline().strip().split(",")

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_no_device_is_given_twice(hold):
    _, first = hold(1, "sft")
    _, second = hold(1, "ppo")
    with reserved(1, "reward", print) as third:
        assert sorted([*first, *second, *third]) == ["0", "1", "2"]


def test_waiting_says_who_holds_them_and_a_dead_holder_frees_them(hold):
    process, _ = hold(2, "sft of run-1")
    reported = []

    def report(text):
        reported.append(text)
        process.kill()

    began = time.monotonic()
    with reserved(2, "ppo", report) as held:
        assert len(held) == 2
    assert time.monotonic() - began < 10
    assert reported[0].startswith("waiting for 2 free devices of 3; held by sft of run-1 (device ")


def test_more_than_there_are_is_refused(hold):
    with pytest.raises(ConfigError, match="needs 4 devices, and this machine has 3"):  # noqa: SIM117
        with reserved(4, "ppo", print):
            pass


def test_machine_without_devices_reserves_nothing(monkeypatch):
    monkeypatch.setenv("RLHF_DEVICES", "")
    assert devices() == []
    with reserved(8, "ppo", print) as held:
        assert held == []
