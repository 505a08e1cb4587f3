"""A stage killed in the middle and started again ends in the bytes of one that was not.

Every attempt costs a start of all ranks, so there are few cases here; `make chaos` has every
combination of algorithm, ranks, strategy and way to die.
"""

import json
import random
import signal

import pytest

from tests.faults.stage import (
    PLACEMENT,
    PREFERENCE,
    Place,
    largest_difference,
    make_job,
)
from tests.rlhf_core.algorithms.stages import weight_hashes

pytestmark = pytest.mark.slow


def killed(target, update, rank=0):
    return {"what": "kill", "target": target, "update": update, "rank": rank}


DEATHS = {
    "ppo": killed("rank", 7, rank=1),  # the first of the two updates of the fourth rollout
    "reward": killed("orchestrator", 6),
}


@pytest.mark.parametrize("algorithm", DEATHS)
def test_killed_and_resumed_ends_in_the_same_artifact(place, inputs, undisturbed, algorithm):
    job = make_job(inputs, algorithm, PLACEMENT[algorithm])
    place.run(job, [DEATHS[algorithm]])
    assert place.store.stage_result(job.key()) is None, "it was to be killed before its end"
    place.run(job)
    assert "going on from the checkpoint after step" in place.log()
    artifact = place.result(job)
    assert artifact.digest == undisturbed[algorithm][1].digest
    lines = place.store.read_bytes(artifact.digest, "metrics.jsonl").decode().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == list(range(1, len(steps) + 1)), "the curve has neither gap nor repetition"
    assert place.checkpoints(job) == [], "a finished stage leaves no checkpoint behind"


@pytest.mark.chaos
@pytest.mark.parametrize("algorithm", PREFERENCE)
def test_killed_preference_stage_ends_in_the_same_bytes(place, base, inputs, tmp_path, algorithm):
    """What it was held to before, the untrained model's numbers, it is held to afterwards."""
    job = make_job(inputs, algorithm, {"ranks": 2, "strategy": "ddp"})
    other = Place(base[0], tmp_path / "undisturbed")
    other.run(job)
    place.run(job, [killed("rank", 7, rank=1)])
    assert place.store.stage_result(job.key()) is None, "it was to be killed before its end"
    place.run(job)
    assert "going on from the checkpoint after step" in place.log()
    assert weight_hashes(place.result(job)) == weight_hashes(other.result(job))


@pytest.mark.chaos
@pytest.mark.parametrize("strategy", ("fsdp2", "zero1", "ddp"))
def test_killed_in_the_middle_of_saves_ends_in_the_same_bytes(
    place, base, inputs, tmp_path, strategy
):
    """Each attempt dies at another point of its second checkpoint, in one rank or in both."""
    job = make_job(inputs, "sft", {"ranks": 2, "strategy": strategy}, max_steps=200)
    other = Place(base[0], tmp_path / "undisturbed")
    other.run(job)
    chance = random.Random(strategy)
    points = ["copied", "written", "upload", "uploaded", "publish", "published"]
    chance.shuffle(points)
    pace = {"what": "sleep", "seconds": 0.05}  # a few steps while a checkpoint is stored
    for point in points:
        rank = 0 if point.startswith("publish") else chance.choice([0, 1, None])
        fault = {"what": "kill", "target": "rank", "where": point, "save": 2}
        before = place.checkpoints(job)
        place.run(job, [pace, fault if rank is None else fault | {"rank": rank}])
        assert place.store.stage_result(job.key()) is None, f"it was to be killed at {point}"
        assert place.checkpoints(job)[-1:] > before[-1:], "the first checkpoint was stored"
    place.run(job)
    assert "going on from the checkpoint after step" in place.log()
    assert weight_hashes(place.result(job)) == weight_hashes(other.result(job))
    assert place.checkpoints(job) == []


@pytest.mark.chaos
@pytest.mark.parametrize("algorithm", ("grpo", "rloo", "reinforce_pp"))
def test_killed_without_critic_ends_in_the_same_bytes(place, base, inputs, tmp_path, algorithm):
    job = make_job(inputs, algorithm, PLACEMENT["ppo"])
    place.run(job, [DEATHS["ppo"]])
    assert place.store.stage_result(job.key()) is None, "it was to be killed before its end"
    place.run(job)
    assert "going on from the checkpoint after step" in place.log()
    whole = Place(base[0], tmp_path / "whole")
    whole.run(job)
    assert weight_hashes(place.result(job)) == weight_hashes(whole.result(job))


def test_stopped_then_killed_stage_goes_on_and_so_does_another_number_of_ranks(
    place, inputs, undisturbed, tmp_path
):
    """First torchrun gets SIGTERM, as when a node is drained, more than once, as from Slurm; then
    all ranks are killed."""
    two = make_job(inputs, "sft", PLACEMENT["sft"] | {"checkpoint_every": 1000})
    fault = {"what": "kill", "target": "agent", "signal": signal.SIGTERM, "update": 7, "rank": 1}
    fault["times"] = 3
    said = place.run(two, [fault, {"what": "sleep", "seconds": 0.3}])
    [step] = place.checkpoints(two)
    assert 7 <= step < 9, "the signal came at step 7"
    assert "FAILED preempted: stage failed: told to stop; the next attempt goes on " in said
    assert f"after step {step}\n" in said

    two = make_job(inputs, "sft", PLACEMENT["sft"] | {"checkpoint_every": 1})
    place.run(two, [{"what": "kill", "target": "rank", "update": 3}])
    assert f"going on from the checkpoint after step {step}" in place.log()
    assert place.checkpoints(two)[-1] > step

    copy = Place(place.folder, tmp_path / "copy")
    one = make_job(inputs, "sft", {"ranks": 1, "strategy": "ddp"})
    assert one.key() == two.key()
    for where, job in ((place, two), (copy, one)):
        where.run(job)
        assert "going on from the checkpoint after step" in where.log()
    other, expected = undisturbed["sft"]
    assert weight_hashes(place.result(two)) == weight_hashes(expected)
    # On one rank sums are taken in another order: equal up to rounding.
    start = place.store.get(inputs["model"])
    assert largest_difference(copy, copy.result(one), other, expected) < 1e-5
    assert largest_difference(copy, copy.result(one), copy, start) > 1e-3
