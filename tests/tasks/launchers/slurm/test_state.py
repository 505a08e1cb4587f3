"""What Slurm 22.05.8 and 24.11.5 printed, and what follows from it.

slurm-VERSION.txt has the output of real commands: jobs that run, wait and end, in the same order.
"""

from pathlib import Path

import pytest

from tasks.launchers.slurm.state import (
    JobState,
    live_jobs,
    parse_job,
    place_in_queue,
    scheduler_view,
    what_next,
)

VERSIONS = ("22.05", "24.11")


def recorded(version):
    """Title -> lines of one version's output; the jobs before the first title have the title ""."""
    sections, title = {}, ""
    text = Path(__file__).with_name(f"slurm-{version}.txt").read_text()
    for line in text.splitlines():
        if line.startswith("== "):
            title = line.removeprefix("== ")
        sections.setdefault(title, []).append(line)
    return sections


@pytest.fixture(params=VERSIONS)
def output(request):
    return recorded(request.param)


def test_jobs_are_read_alike_from_both_versions(output):
    running, resources, priority, limit, held = (parse_job(x) for x in output[""][1:6])
    assert (running.state, running.reason, running.ended, running.waiting) == (
        "RUNNING", "None", False, False,
    )  # fmt: skip
    assert (resources.state, resources.reason, resources.partition) == (
        "PENDING", "Resources", "main",
    )  # fmt: skip
    assert resources.start.startswith("2026-11-30T01:4") and resources.waiting
    assert (priority.reason, limit.reason, limit.start, held.reason) == (
        "Priority", "PartitionTimeLimit", "", "JobHeldUser",
    )  # fmt: skip


def test_requeue_cancellation_and_exit_code_are_read_alike(output):
    after = output["queue"][5:]
    requeued, cancelled = parse_job(after[0]), parse_job(after[3])
    assert (requeued.state, requeued.reason, requeued.restarts) == ("PENDING", "BeginTime", 1)
    assert (cancelled.state, cancelled.comment) == ("CANCELLED", "rlhf-stopped")
    failed = parse_job(output["unknown"][3])
    assert (failed.state, failed.reason, failed.ended) == ("FAILED", "NonZeroExitCode", True)


def test_unknown_job_is_told_from_a_controller_that_does_not_answer(output):
    assert parse_job(output["unknown"][1]) is None
    with pytest.raises(ValueError, match="Unable to contact"):
        parse_job("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")


def test_live_jobs_are_those_that_have_not_ended():
    text = "12|COMPLETING\n9|CANCELLED\n10|PENDING\n101|RUNNING\n8|TIMEOUT\n"
    assert live_jobs(text) == ["10", "12", "101"]
    assert live_jobs("") == []


def test_place_in_queue_is_by_priority_then_by_age(output):
    text = "\n".join(output["queue"][1:5])
    places = [place_in_queue(text, row.split("|")[0]) for row in output["queue"][1:5]]
    assert sorted(places) == [1, 2, 3, 4]
    # 22.05 gave each job a lower priority than the one before, 24.11 all the same
    waiting = [parse_job(line) for line in output[""][2:6]]
    by_reason = {job.reason: place_in_queue(text, job.id) for job in waiting}
    assert by_reason["Resources"] == 1 and by_reason["JobHeldUser"] == 4
    assert place_in_queue("7_[0-9]|5\n12|5\n3|9\n", "12") == 3
    assert place_in_queue("3|9\n", "12") is None


def job(state, reason="None", comment=""):
    return JobState("5", state, reason, comment=comment)


@pytest.mark.parametrize(
    ("ended", "category", "following"),
    [
        (job("TIMEOUT"), "preempted", "continue"),
        (job("NODE_FAIL"), "lost", "continue"),
        (job("PREEMPTED"), "preempted", "continue"),
        (job("FAILED"), "preempted", "continue"),  # SIGTERM of a drained node, a late notice
        (job("FAILED"), "lost", "fail"),  # a rank was killed: Prefect's retry, with its delay
        (job("TIMEOUT"), "nonfinite", "fail"),  # the ranks' own reason
        (job("COMPLETED"), "config", "fail"),
        (job("OUT_OF_MEMORY"), "oom", "fail"),  # retried with half the micro-batch
        (job("CANCELLED"), "cancelled", "fail"),  # scancel by a person
        (job("CANCELLED", comment="rlhf-stopped"), "cancelled", "restart"),
        (None, "preempted", "continue"),
        (None, "lost", "fail"),
    ],
)
def test_end_of_a_job_decides_what_follows(ended, category, following):
    assert what_next(ended, category) == following


@pytest.mark.parametrize(
    ("ended", "category"),
    [
        (job("TIMEOUT"), "preempted"), (job("NODE_FAIL"), "lost"), (job("OUT_OF_MEMORY"), "oom"),
        (job("CANCELLED"), "cancelled"), (job("PENDING", "JobHoldMaxRequeue"), "lost"),
        (job("PENDING", "launch_failed_requeued_held"), "lost"),
    ],
)  # fmt: skip
def test_category_of_what_slurm_knows(ended, category):
    assert scheduler_view(ended)[0] == category


def test_slurm_says_nothing_where_the_nodes_know_more():
    assert scheduler_view(job("FAILED")) is None and scheduler_view(None) is None
