"""A loss that is NaN: the step is named, the batch is kept, and the last checkpoint too."""

import json

import pytest

from tests.faults.stage import make_job

pytestmark = pytest.mark.slow


def nan(update):
    """On rank 1, as long as the learning rate is above 0.6e-3."""
    return [{"what": "nan", "rank": 1, "update": update, "above": 0.6e-3}]


def lines(place, artifact):
    text = place.store.read_bytes(artifact.digest, "metrics.jsonl").decode()
    return [json.loads(line) for line in text.splitlines()]


def test_nan_keeps_batch_and_checkpoint_and_goes_on_with_a_lower_rate(place, inputs):
    job = careful(inputs)
    said = place.run(job, nan(7))
    assert "FAILED rate_lowered: stage failed: sft step 7, rank 1: the loss is nan." in said
    assert "from the checkpoint after step 6 with the learning rate times 0.5" in said
    assert 6 in place.checkpoints(job), "the last good checkpoint is kept"

    [diagnostic] = place.store.list("diagnostic")
    assert diagnostic.ref in said
    batch = json.loads(place.store.read_bytes(diagnostic.digest, "batch.json"))
    assert (batch["step"], batch["rank"], batch["learning_rate"]) == (7, 1, 1e-3)
    assert len(batch["rows"]) == 8
    assert all(row["input_ids"] for row in batch["rows"])
    assert set(batch["micro_batch"]) < set(range(8))
    assert (place.attempt / "nonfinite-step7-rank1/batch.json").is_file()

    place.run(job, nan(1))  # the rate is now too low for it
    artifact = place.result(job)
    assert artifact.metadata["learning_rate_lowered"] == [{"factor": 0.5, "step": 7}]
    rates = [line["learning_rate"] for line in lines(place, artifact)]
    assert rates == [1e-3] * 6 + [0.5e-3] * 6
    left = place.store.scoped(f"checkpoints/{job.key()}").list_records("lowered/")
    assert left == []


@pytest.mark.chaos
def test_stage_that_failed_by_nan_can_be_taken_up_by_a_careful_one(place, inputs):
    job = careful(inputs).fail_fast_variant()
    said = place.run(job, nan(7))
    assert "FAILED nonfinite: stage failed: sft step 7, rank 1: the loss is nan." in said
    assert "sft.on_nonfinite to 0.5" in said
    assert "goes on from the checkpoint after step 6 with half the learning rate" in said
    # It begins where the other one stopped, and meets the same NaN.
    said = place.run(careful(inputs), nan(1))
    assert "going on from the checkpoint after step 6" in place.log()
    assert "FAILED rate_lowered" in said
    place.run(careful(inputs), nan(1))
    assert place.result(careful(inputs)).metadata["learning_rate_lowered"]
    assert place.store.stage_result(job.key()) is None, "the result is not that of the other stage"


@pytest.mark.chaos
def test_rate_is_lowered_twice_at_most(place, inputs):
    for expected in ("rate_lowered", "rate_lowered", "nonfinite"):
        said = place.run(careful(inputs), [{"what": "nan", "above": 0.0, "update": 1}])
        assert f"FAILED {expected}: " in said
    assert "has lowered the learning rate 2 times already, to 0.25 of what was set" in said


def careful(inputs):
    return make_job(
        inputs, "sft", {"ranks": 2, "strategy": "zero2"}, on_nonfinite=0.5,
        schedule="constant", warmup_fraction=0.0,
    )  # fmt: skip


@pytest.mark.chaos
def test_nan_in_ppo_keeps_the_rollout(place, inputs):
    job = make_job(inputs, "ppo", {"ranks": 1}, schedule="constant", warmup_fraction=0.0)
    said = place.run(job, [{"what": "nan", "update": 6, "above": 0.0}])
    assert "FAILED nonfinite: stage failed: ppo step 3, rank 0: the loss is nan." in said
    [diagnostic] = place.store.list("diagnostic")
    assert {f.path for f in diagnostic.files} == {"batch.json", "batch.safetensors"}
    from safetensors.numpy import load_file

    tensors = load_file(
        place.store.fetch(diagnostic.digest, place.folder / "d") / "batch.safetensors"
    )
    assert tensors["advantages"].shape == tensors["response_mask"].shape
    assert len(tensors["response_mask"]) == 8
