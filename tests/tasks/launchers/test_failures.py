"""Which of several errors is the one to report."""

import json

import pytest

from tasks.launchers.failures import DeadRank, diagnose, shorten


@pytest.fixture
def report(tmp_path):
    def write(errors, returncode=1, dead_rank=None, **seen):
        for rank, (category, message, when) in errors.items():
            value = {"category": category, "message": message, "time": when}
            (tmp_path / f"error-{rank}.json").write_text(json.dumps(value))
        error = diagnose("sft", [tmp_path], returncode, dead_rank, tmp_path / "log.txt", **seen)
        return error.category, str(error).splitlines()[0]

    return write


def test_earliest_real_category_wins(report):
    found = report({0: ("internal", "ValueError: x", 1), 1: ("oom", "b", 3), 2: ("data", "c", 2)})
    assert found == ("data", "sft failed: c")


def test_own_bug_wins_over_what_the_others_say(report):
    found = report(
        {
            0: ("internal", "RuntimeError: [gloo] Connection closed by peer", 1),
            1: ("internal", "KeyError: 'x'", 2),
        },
        dead_rank=(0, 1),
    )
    assert found == ("internal", "sft failed: rank 1: KeyError: 'x'")


def test_killed_rank_wins_over_what_the_others_say(report):
    found = report({0: ("internal", "Connection reset by peer", 1)}, dead_rank=(1, -9))
    assert found[0] == "lost"
    assert "rank 1 was killed by SIGKILL" in found[1]


def test_only_secondary_failures_mean_lost(report):
    assert report({0: ("internal", "NCCL error: timed out", 1)}, dead_rank=(0, 1))[0] == "lost"


def test_crash_by_another_signal_is_named(report):
    assert "rank 0 was killed by SIGSEGV" in report({}, dead_rank=(0, -11))[1]


KERNEL = " (oom_kill in /x rose from 0 to 1)\nMain memory at the peak: rank 1 3 GiB"


def test_kernels_killer_wins_over_what_the_others_say(report):
    others = {0: ("hang", "rank 0 waited", 1)}
    found = report(others, dead_rank=(1, -9), out_of_memory=KERNEL)
    assert found[0] == "oom"
    assert "rank 1 was killed by the kernel for lack of memory (oom_kill in /x" in found[1]
    assert report({}, returncode=-9, out_of_memory=KERNEL)[0] == "oom"


def test_kernels_killer_elsewhere_is_not_this_jobs_reason(report):
    assert report({0: ("data", "row 7", 1)}, out_of_memory=KERNEL)[0] == "data"


def test_crash_while_the_kernel_kills_elsewhere_is_a_crash(report):
    assert report({}, dead_rank=(1, -11), out_of_memory=KERNEL)[0] == "lost"


def test_stopped_torchrun_is_preempted_unless_a_rank_has_a_reason(report):
    message = "sft failed: its processes got a signal to stop"
    assert report({}, stopped=True) == ("preempted", message)
    assert report({0: ("data", "row 7", 1)}, stopped=True)[0] == "data"


@pytest.mark.parametrize(
    ("line", "stopped"),
    [
        ("W1124 api.py:727] Received Signals.SIGTERM death signal, shutting down workers", True),
        ("torch.distributed.elastic...api.SignalException: Process 41 got signal: 15", True),
        ("W1124 api.py:1021] Sending process 3488 closing signal SIGTERM", False),
    ],
)
def test_torchrun_says_when_it_is_told_to_stop(line, stopped):
    dead = DeadRank()
    dead.feed(line)
    assert dead.stopped == stopped


def test_half_an_error_file_is_passed_over(report, tmp_path):
    (tmp_path / "error-0.json").write_text('{"categ')
    assert report({}, returncode=-15) == ("lost", "sft failed: the process was killed by SIGTERM")


def test_long_messages_are_cut():
    assert len(shorten("x" * 5000)) == 1500


NOTICED_FIRST = (
    "E1124 api.py:1002] failed (exitcode: 1) local_rank: 0 (pid: 3488) of binary: python"
)
SUMMARY = """\
  rank      : 1 (local_rank: 1)
  exitcode  : {} (pid: 3489)  ({})
  traceback : Signal received by PID 3489
  rank      : 0 (local_rank: 0)
  exitcode  : 1 (pid: 3488)"""


@pytest.mark.parametrize(
    ("code", "name", "expected"), [(-9, "SIGKILL", (1, -9)), (-15, "SIGTERM", (0, 1))]
)
def test_a_killed_rank_outranks_one_that_lost_it_but_not_one_that_torchrun_ended(
    code, name, expected
):
    dead = DeadRank()
    for line in [NOTICED_FIRST, *SUMMARY.format(code, name).splitlines()]:
        dead.feed(line)
    assert dead.found == expected
