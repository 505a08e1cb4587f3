"""`rlhf up` beside a system that runs already, and its supervisor."""

import sys
import threading
import time

from flows.cli.supervisor import Supervisor
from flows.cli.system import Options, folder

SLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]


def test_the_s3_servers_files_are_synced_as_long_as_it_runs_and_after_a_restart(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("RLHF_HOME", str(tmp_path))
    folder().mkdir()
    before, supervisor = set(threading.enumerate()), Supervisor(Options())

    def syncing():
        return [t.name for t in set(threading.enumerate()) - before]

    try:
        supervisor._start("s3", SLEEP, {})
        assert syncing() == ["rlhf-sync"]
        supervisor.services["s3"][2].terminate(5)
        deadline = time.monotonic() + 20
        while syncing() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not syncing(), "the thread ends with its server"
        supervisor._restart_ended()
        assert syncing() == ["rlhf-sync"]
    finally:
        supervisor.services["s3"][2].terminate(5)


def test_up_says_that_a_system_runs_already(rlhf, running):
    said = rlhf("up", code=0).stdout
    assert "already running" in said and "http://127.0.0.1:9" in said
    rlhf("up", "--no-s3", "--port", "9", code=0)


def test_up_with_other_options_on_a_running_system_is_refused(rlhf, running):
    said = rlhf("up", "--slots", "4", "--s3-port", "0", code=1).stderr
    assert "running already, with --no-s3 --slots 1; --s3-port 0 --slots 4 would change" in said
    assert "rlhf down" in said
