"""Which of several errors is the one to report."""

import json

import pytest

from tasks.launchers.failures import DeadRank, diagnose, shorten


@pytest.fixture
def report(tmp_path):
    def write(errors, returncode=1, dead_rank=None):
        for rank, (category, message, when) in errors.items():
            value = {"category": category, "message": message, "time": when}
            (tmp_path / f"error-{rank}.json").write_text(json.dumps(value))
        error = diagnose("sft", [tmp_path], returncode, dead_rank, tmp_path / "log.txt")
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
        dead.see(line)
    assert dead.found == expected
