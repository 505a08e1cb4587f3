"""A stage killed in the middle and started again ends in the bytes of one that was not."""

import pytest

from rlhf_core.jobs import PPOJob, Resources, RewardJob, SFTJob
from tests.rlhf_core.train.stages import Stages, weight_hashes
from tests.rlhf_core.train.test_stages import SMALL

pytestmark = pytest.mark.slow

RANKS = 2


@pytest.fixture(scope="module")
def reward(stages, models, data):
    job = RewardJob(model=models["llama"], data=data["preference"], batch_size=8, max_steps=2,
                    max_new_tokens=4, **SMALL)  # fmt: skip
    return stages.run(job)[0]


def jobs(models, data, reward):
    place = {"checkpoint_every": 2, "micro_batch_size": 2, "threads": 1}
    ddp, zero = Resources(ranks=RANKS, **place), Resources(ranks=RANKS, strategy="zero2", **place)
    common = {"model": models["llama"], "learning_rate": 1e-3, "warmup_fraction": 0.1,
              "precision": "fp32"}  # fmt: skip
    return {
        "sft": SFTJob(data=data["sft"], batch_size=8, max_steps=60, epochs=60, resources=ddp,
                      **common),
        "reward": RewardJob(data=data["preference"], batch_size=8, max_steps=150, epochs=60,
                            max_new_tokens=4, resources=zero, **common),
        "ppo": PPOJob(reward_model=reward.digest, prompts=data["prompts"], steps=20,
                      batch_size=8, ppo_epochs=2, max_new_tokens=6, resources=ddp, **common),
    }  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(stages, models, data, reward):
    """Each algorithm run through, in a store of its own."""
    other = Stages(stages.folder / "undisturbed")
    other.folder.mkdir()
    for artifact in stages.store.list():
        other.store.publish(
            stages.store.fetch(artifact.digest), kind=artifact.kind,
            metadata=artifact.metadata, parents=artifact.parents,
        )  # fmt: skip
    every = jobs(models, data, reward)
    return dict(zip(every, other.run(*every.values(), ranks=RANKS), strict=True))


@pytest.mark.parametrize("algorithm", ("sft", "reward", "ppo"))
def test_killed_and_resumed_ends_in_the_same_bytes(
    stages, models, data, reward, undisturbed, algorithm
):
    job = jobs(models, data, reward)[algorithm]
    stages.run_killed(job, RANKS, after_step=5)
    folder_count = stages._number
    artifact = stages.run(job, ranks=RANKS)[0]
    assert weight_hashes(artifact) == weight_hashes(undisturbed[algorithm])
    steps = [m["step"] for m in stages.metrics(artifact)]
    assert steps == list(range(1, len(steps) + 1)), "the curve has neither gap nor repetition"
    assert folder_count + 1 == stages._number
    left = stages.store.scoped(f"checkpoints/{job.key()}").list("checkpoint")
    assert left == [], "a finished stage leaves no checkpoint behind"
