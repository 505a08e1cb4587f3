"""Ranks that are told to stop, and ranks that hang."""

import json
import re
import signal
import time

import pytest

from tests.faults.stage import make_job, weight_hashes

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("target", ["agent", "orchestrator"])
def test_told_to_stop_ranks_write_a_checkpoint_and_leave_in_time(
    place, inputs, undisturbed, target
):
    """The agent: a node is drained. The orchestrator: a run is cancelled."""
    ranks = {"ranks": 2, "strategy": "zero2"}
    job = make_job(inputs, "sft", ranks | {"checkpoint_every": 1000})
    told = place.folder / "told"
    fault = {"what": "kill", "target": target, "signal": signal.SIGTERM, "update": 7, "rank": 1,
             "once": str(told)}  # fmt: skip
    # Slow enough that the signal arrives before the last step.
    said = place.run(job, [fault, {"what": "sleep", "seconds": 0.2}])
    assert time.time() - told.with_name("told-1").stat().st_mtime < 30
    [step] = place.checkpoints(job)
    assert 7 <= step < 12
    if target == "agent":
        assert "FAILED preempted: stage failed: told to stop; the next attempt goes on " in said
        assert f"after step {step}\n" in said
    place.run(job)
    assert f"going on from the checkpoint after step {step}" in place.log()
    expected = undisturbed("sft", 2, "zero2")[1]
    assert weight_hashes(place.result(job)) == weight_hashes(expected)


def test_hanging_rank_ends_the_job_with_every_stack_in_the_log(place, inputs):
    job = make_job(inputs, "sft", {"ranks": 2, "collective_timeout": 10})
    mark = place.folder / "hangs"
    said = place.run(job, [{"what": "sleep", "rank": 1, "update": 6, "once": str(mark)}])
    took = time.time() - mark.with_name("hangs-1").stat().st_mtime
    assert 10 <= took < 16, took
    assert "FAILED hang: stage failed: rank 0 waited 10 s (resources.collective_timeout)" in said
    log = place.log()
    for rank, place_in_code in ((0, "train/sft.py"), (1, "in sleep\n")):
        [start] = [m.end() for m in re.finditer(rf"rank {rank}(?:, thread MainThread)?:\n", log)]
        assert place_in_code in log[start : start + 4000], rank
    assert place.processes() == []
    assert place.checkpoints(job), "the retry has something to go on from"


def test_rank_that_cannot_come_to_a_step_leaves_by_itself(place, inputs):
    """A single rank in the middle of a step that does not end."""
    job = make_job(inputs, "sft", {"ranks": 1, "stop_seconds": 3})
    mark = place.folder / "hangs"
    process = place.start(job, [{"what": "sleep", "update": 4, "once": str(mark)}])
    while not mark.with_name("hangs-0").exists():
        assert process.poll() is None, place.log()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert place.wait_for_quiet(30) < 8
    process.wait(10)
    error = json.loads((place.attempt / "error-0.json").read_text())
    assert error["category"] == "preempted"
    assert "in sleep\n" in place.log()
