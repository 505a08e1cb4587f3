"""A stage killed in the middle and started again ends in the bytes of one that was not."""

import pytest

from tests.faults.stage import largest_difference, make_job, weight_hashes

pytestmark = pytest.mark.slow

# Every algorithm, one and two ranks, both strategies, every way to die; `make chaos` does them all.
CASES = {
    "sft, two ranks, zero2, one rank": ("sft", 2, "zero2", "rank"),
    "sft, one rank, ddp, orchestrator": ("sft", 1, "ddp", "orchestrator"),
    "reward, two ranks, ddp, agent": ("reward", 2, "ddp", "agent"),
    "ppo, two ranks, zero2, all ranks": ("ppo", 2, "zero2", "all"),
}


def faults(way, update, folder):
    """The kill as tests.faults.ranks takes it; all ranks: each kills itself."""
    fault = {"what": "kill", "target": "rank" if way == "all" else way, "update": update}
    if way != "all":
        fault["rank"] = 0 if way != "rank" else 1
    return [fault | {"once": str(folder / "killed")}]


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_ends_in_the_same_bytes(place, inputs, undisturbed, case):
    algorithm, ranks, strategy, way = CASES[case]
    job = make_job(inputs, algorithm, {"ranks": ranks, "strategy": strategy})
    # In PPO the ninth update is in the middle of the fifth rollout.
    place.run(job, faults(way, 9, place.folder))
    assert place.store.stage_result(job.key()) is None, "it was to be killed before its end"
    assert place.checkpoints(job)
    place.run(job)
    artifact = place.result(job)
    assert "going on from the checkpoint after step" in place.log()
    assert weight_hashes(artifact) == weight_hashes(undisturbed(algorithm, ranks, strategy)[1])
    steps = [line.split('"step": ')[1].split(",")[0] for line in metrics(place, artifact)]
    assert steps == [str(i + 1) for i in range(len(steps))], "neither gap nor repetition"
    assert place.checkpoints(job) == [], "a finished stage leaves no checkpoint behind"


def metrics(place, artifact):
    return place.store.read_bytes(artifact.digest, "metrics.jsonl").decode().splitlines()


def test_resume_on_fewer_ranks_differs_by_rounding_only(place, inputs, undisturbed):
    two = make_job(inputs, "sft", {"ranks": 2, "strategy": "zero2"})
    place.run(two, faults("all", 7, place.folder))
    one = make_job(inputs, "sft", {"ranks": 1, "strategy": "ddp"})
    assert one.key() == two.key()
    place.run(one)
    assert "going on from the checkpoint after step" in place.log()
    other, expected = undisturbed("sft", 2, "zero2")
    start = place.store.get(inputs["model"])
    assert largest_difference(place, place.result(one), other, expected) < 1e-5
    assert largest_difference(place, place.result(one), place, start) > 1e-3
