"""How a launch over several nodes ended, by what its nodes left in the store."""

import pytest

from rlhf_core.errors import ArtifactNotFound
from rlhf_core.jobs import DataJob, SFTJob
from rlhf_core.runtime.launches import (
    CONSEQUENCE,
    DONE,
    ENDED,
    LOST,
    SIGNAL,
    STOPPED,
    NodeReport,
    exit_code,
    forget,
    launch_id,
    read_jobs,
    write_jobs,
    write_report,
)
from tasks.launchers.outcome import failure
from tasks.launchers.remote_output import RemoteOutput, progress_line

D = "0" * 64


def told(store, *reports, scheduler=None):
    for node, more in enumerate(reports):
        if more is not None:
            write_report(store, "l", "7-0", NodeReport(node=node, host=f"gpu{node}", **more))
    error = failure(store, "sft", "l", "7-0", len(reports), where="Job: 7", scheduler=scheduler)
    assert str(error).endswith("\nJob: 7")
    return error.category, str(error).splitlines()[0].removeprefix("sft failed: ")


def failed(category, text, time, weight=0):
    return {
        "state": "failed", "category": category, "text": text, "time": time, "weight": weight
    }  # fmt: skip


def test_the_rank_that_failed_first_has_the_word(store):
    first = failed("nonfinite", "rank 5: the loss is NaN", 10.0)
    later = failed("data", "row 7 has no text", 11.0)
    assert told(store, later, first) == ("nonfinite", "node 1 (gpu1): rank 5: the loss is NaN")


def test_a_reason_goes_before_what_follows_from_it(store):
    lost = failed("lost", "rank 0 lost the others", 9.0, CONSEQUENCE)
    stopped = failed("preempted", "stopped by SIGTERM", 9.5, SIGNAL)
    reason = failed("oom", "rank 9 ran out of memory", 10.0)
    assert told(store, lost, stopped, reason)[0] == "oom"
    assert told(store, lost, stopped, {"state": "done"}, scheduler=None)[0] == "preempted"


def test_a_silent_node_has_vanished_unless_the_scheduler_knows_more(store):
    lost = failed("lost", "rank 0 lost the others", 9.0, CONSEQUENCE)
    assert told(store, lost, {"state": "running"}, None) == (
        "lost", "node 1 (gpu1) and node 2 vanished: its agent ended without a word",
    )  # fmt: skip
    timeout = ("preempted", "reached its time limit")
    assert told(store, lost, {"state": "running"}, scheduler=timeout) == timeout
    assert told(store, failed("data", "row 7", 1.0), None, scheduler=timeout)[0] == "data"


def test_a_launch_of_which_nothing_is_known_is_lost(store):
    assert told(store, None, None)[0] == "lost"


def test_jobs_come_back_and_their_id_follows_from_their_keys(store):
    jobs = [DataJob(model=D, purpose=purpose) for purpose in ("sft", "prompts")]
    found = write_jobs(store, "data", jobs)
    assert read_jobs(store, found) == ("data", jobs)
    assert found == launch_id(jobs) != launch_id(jobs[:1])
    placed = SFTJob(model=D, data=D, resources={"nodes": 4})
    assert launch_id([placed]) == launch_id([SFTJob(model=D, data=D)])
    forget(store, found)
    with pytest.raises(ArtifactNotFound, match="is it the store of the pipeline"):
        read_jobs(store, found)
    assert store.list_records("launches/") == []


@pytest.mark.parametrize(
    ("category", "code"),
    [
        (None, DONE), ("config", ENDED), ("internal", ENDED), ("oom", ENDED), ("lost", LOST),
        ("hang", LOST), ("store", LOST), ("rate_lowered", LOST), ("preempted", STOPPED),
    ],
)  # fmt: skip
def test_exit_codes(category, code):
    assert exit_code(category) == code


def test_progress_is_told_from_output():
    output, progress = [], []
    read = RemoteOutput(output.append, progress.append)
    for line in (progress_line({"step": 1}) + "\n", "loss 1\n", "rlhf-progress {cut", "\n"):
        read(line)
    assert (output, progress) == (["loss 1", "rlhf-progress {cut"], [{"step": 1}])
