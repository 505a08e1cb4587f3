"""Ranks that are told to stop, and ranks that hang."""

import json
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.faults.stage import make_job
from tests.rlhf_core.algorithms.stages import weight_hashes

pytestmark = pytest.mark.slow


@pytest.mark.chaos
@pytest.mark.parametrize("targets", [["rank"], ["orchestrator"], ["agent", "orchestrator"]])
def test_told_to_stop_ranks_write_a_checkpoint_and_leave_in_time(
    place, inputs, undisturbed, targets
):
    """One rank: by hand. The orchestrator: a run is cancelled. It and the agent: Ctrl-C."""
    ranks = {"ranks": 2, "strategy": "zero2"}
    job = make_job(inputs, "sft", ranks | {"checkpoint_every": 1000})
    told = place.folder / "told"
    number = signal.SIGINT if len(targets) == 2 else signal.SIGTERM
    faults = [
        {"what": "kill", "target": target, "signal": number, "update": 7, "rank": 1,
         "once": f"{told}-{target}"}
        for target in targets
    ]  # fmt: skip
    # Slow enough that the signal arrives before the last step.
    said = place.run(job, [*faults, {"what": "sleep", "seconds": 0.2}])
    assert time.time() - Path(f"{told}-{targets[0]}-1").stat().st_mtime < 30
    [step] = place.checkpoints(job)
    assert 7 <= step < 12
    if targets == ["rank"]:  # all of them leave for it
        assert "FAILED preempted: stage failed: told to stop; the next attempt goes on " in said
        assert f"after step {step}\n" in said
    place.run(job)
    assert f"going on from the checkpoint after step {step}" in place.log()
    expected = undisturbed["sft"][1]
    assert weight_hashes(place.result(job)) == weight_hashes(expected)


def test_killed_rank_is_named_though_another_fails_for_it_first(place, inputs):
    """torchrun looks at its ranks now and then, and names one of those that have ended by then."""
    job = make_job(inputs, "sft", {"ranks": 2})
    mark = place.folder / "there"
    process = place.start(job, [{"what": "sleep", "seconds": 1, "update": 4, "once": str(mark)}])
    while not mark.with_name("there-1").exists():
        assert process.poll() is None, place.log()
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    [agent] = [p for p in family if p.name() == "rlhf torchrun"]
    [rank] = [p for p in family if p.name() == "rlhf rank 1"]
    agent.suspend()
    rank.kill()
    while not (place.attempt / "error-0.json").exists():
        time.sleep(0.05)
    time.sleep(1)
    agent.resume()
    process.wait(60)
    place.wait_for_quiet()
    assert "FAILED lost: stage failed: rank 1 was killed by SIGKILL" in place.said()
    assert "Connection closed by peer" in place.log()


def test_hanging_rank_ends_the_job_with_every_stack_in_the_log(place, inputs):
    job = make_job(inputs, "sft", {"ranks": 2, "collective_timeout": 10})
    mark = place.folder / "hangs"
    said = place.run(job, [{"what": "sleep", "rank": 1, "update": 6, "once": str(mark)}])
    took = time.time() - mark.with_name("hangs-1").stat().st_mtime
    assert 10 <= took < 60, took
    assert "FAILED hang: stage failed: rank 0 waited 10 s (resources.collective_timeout)" in said
    log = place.log()
    for rank, place_in_code in ((0, "algorithms/sft.py"), (1, "in sleep\n")):
        [start] = [m.end() for m in re.finditer(rf"rank {rank}(?:, thread MainThread)?:\n", log)]
        assert place_in_code in log[start : start + 4000], rank
    assert place.processes() == []
    assert place.checkpoints(job), "the retry has something to go on from"


@pytest.mark.chaos
def test_rank_that_cannot_come_to_a_step_leaves_by_itself(place, inputs):
    """A single rank in the middle of a step that does not end."""
    job = make_job(inputs, "sft", {"ranks": 1, "stop_timeout": 3})
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
