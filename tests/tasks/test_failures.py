"""Which of several errors is the one to report."""

import json

import pytest

from tasks.launchers.failures import diagnose, shorten


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
