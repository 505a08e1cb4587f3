"""Training on mixtures, as real jobs: the plan is followed, and every source is measured."""

import json

import numpy as np
import pytest

from rlhf_core.data.dataset.card import DataCard
from rlhf_core.data.dataset.reading import Rows
from rlhf_core.jobs import (
    DataJob,
    DPOJob,
    GRPOJob,
    KTOJob,
    MixedData,
    MixJob,
    PretrainJob,
    Resources,
    RewardJob,
    SFTJob,
)
from rlhf_core.training.batching import batch_rows
from tests.rlhf_core.torchrun import run_ranks

pytestmark = pytest.mark.slow

STEPS = 3
EXTRA = {
    "prompts": lambda i: {"prompt": f"Count {i}"},
    "sft": lambda i: {"prompt": f"Count {i}", "completion": f"one {i}"},
    "preference": lambda i: {"prompt": f"Count {i}", "chosen": f"one {i}", "rejected": f"two {i}"},
    "pretrain": lambda i: {"text": f"Count {i}. One, two, three. " * 4},
}


@pytest.fixture(scope="module")
def mixtures(stages, models, data):
    """Purpose -> digest of a mixture: the data set of the other tests, and one of 40 rows."""
    jobs = []
    for purpose, row in EXTRA.items():
        path = stages.folder / f"extra-{purpose}.jsonl"
        path.write_text("".join(json.dumps(row(i)) + "\n" for i in range(40)))
        jobs.append(
            DataJob(purpose=purpose, source=str(path), model=models["llama"], heldout_fraction=0.2)
        )
    extra = stages.run(*jobs)
    jobs = [
        MixJob(
            purpose=purpose,
            model=models["llama"],
            mix=(
                MixedData(name="talk", data=data[purpose], weight=1),
                MixedData(name="count", data=artifact.digest, weight=3),
            ),
        )
        for purpose, artifact in zip(EXTRA, extra, strict=True)
    ]
    return {p: a.digest for p, a in zip(EXTRA, stages.run(*jobs), strict=True)}


def make(kind, models, data, **settings):
    place = {"micro_batch_size": 4, "checkpoint_every": 2, "threads": 1, "device": "cpu"}
    own = {"normalization_prompts": 4, "max_new_tokens": 4} if kind is RewardJob else {}
    values = {
        "model": models["llama"], "data": data, "batch_size": 8, "max_steps": STEPS,
        "learning_rate": 1e-3, "precision": "fp32", "epochs": 3, "resources": Resources(**place),
    }  # fmt: skip
    return kind(**(values | own | settings))


def grpo_job(models, prompts):
    return GRPOJob(
        model=models["llama"], prompts=prompts, steps=1, batch_size=4, group_size=2, eval_every=1,
        max_new_tokens=4, rewards=[{"type": "length", "target": 4, "width": 4}], precision="fp32",
        resources=Resources(threads=1, device="cpu"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(stages, models, mixtures):
    """Algorithm -> artifact. That of sft-cut was cut off after step 2 and started again."""
    jobs = {
        "sft": make(SFTJob, models, mixtures["sft"], eval_every=STEPS),
        "pretrain": make(PretrainJob, models, mixtures["pretrain"], length=48),
        "reward": make(RewardJob, models, mixtures["preference"]),
        "dpo": make(DPOJob, models, mixtures["preference"]),
        "kto": make(KTOJob, models, mixtures["preference"]),
        "grpo": grpo_job(models, mixtures["prompts"]),
        "sft-cut": make(SFTJob, models, mixtures["sft"], epochs=4),
    }
    folders = {name: stages.write(job) for name, job in jobs.items()}
    *whole, cut = (str(folder / "job.json") for folder in folders.values())
    arguments = [*whole, "--cut", "2", cut]
    run_ranks(1, "tests.rlhf_core.algorithms.interrupted", *arguments, env=stages.env)
    return {name: stages.result(folder) for name, folder in folders.items()}


def heldout(stages, digest):
    """Held-out rows by their source."""
    rows = Rows(stages.store.fetch(digest), "heldout")
    return {name: rows.take(numbers) for name, numbers in rows.sources.items()}


def assert_mean(found, metric, weights):
    """A metric of all rows is the mean of those of the sources, with these weights."""
    of_sources = [found[f"{metric}/{name}"] for name in weights]
    assert len(set(of_sources)) == 2
    mean = np.average(of_sources, weights=list(weights.values()))
    np.testing.assert_allclose(found[metric], mean, rtol=1e-5)


@pytest.mark.parametrize("stage", ["sft", "pretrain"])
def test_heldout_loss_of_each_source(stages, mixtures, trained, stage):
    tokens = {
        name: sum(sum(row["trainable"][1:]) for row in rows)
        for name, rows in heldout(stages, mixtures[stage]).items()
    }
    found = trained[stage].metadata["metrics"]
    if stage == "sft":
        assert_mean(found, "heldout_loss", tokens)
        assert stages.metrics(trained[stage])[-1]["heldout_loss/talk"] == found["heldout_loss/talk"]
    else:  # which packs, so that first tokens are predicted too
        low, high = sorted(found[f"heldout_loss/{name}"] for name in tokens)
        assert low < found["heldout_loss"] < high


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_heldout_loss_and_accuracy_of_the_pairs_of_each_source(stages, mixtures, trained, stage):
    rows = {name: len(r) for name, r in heldout(stages, mixtures["preference"]).items()}
    found = trained[stage].metadata["metrics"]
    assert_mean(found, "heldout_loss", rows)
    accuracies = [found[f"heldout_accuracy/{name}"] for name in rows]
    assert np.average(accuracies, weights=list(rows.values())) == pytest.approx(
        found["heldout_accuracy"]
    )


def test_accuracy_of_a_reward_model_for_each_source(stages, mixtures, trained):
    found = trained["reward"].metadata["metrics"]["heldout"]
    rows = {name: len(r) for name, r in heldout(stages, mixtures["preference"]).items()}
    assert {name: of["n"] for name, of in found["sources"].items()} == rows
    right = sum(of["accuracy"] * of["n"] for of in found["sources"].values())
    assert right / found["n"] == pytest.approx(found["accuracy"])


def test_heldout_reward_of_each_source(stages, mixtures, trained):
    rows = {name: len(r) for name, r in heldout(stages, mixtures["prompts"]).items()}
    assert sum(rows.values()) <= 64, "all of them are evaluated"
    line = stages.metrics(trained["grpo"])[-1]
    mean = np.average([line[f"heldout_reward/{n}"] for n in rows], weights=list(rows.values()))
    assert mean == pytest.approx(line["heldout_reward"], rel=1e-5)


def test_epochs_follow_the_plan(stages, mixtures):
    train = Rows(stages.store.fetch(mixtures["sft"]), "train")
    talk, count = DataCard.load(train.folder).mixture.sources
    assert (count.epoch, talk.epoch) == (4 * count.train, 4 * count.train // 3)
    steps = range((talk.epoch + count.epoch) // 8)
    names = [train[n]["source"] for step in steps for n in batch_rows(train, 8, step, 0)]
    assert abs(names.count("count") - 3 * names.count("talk")) <= 8


def test_a_stage_goes_on_in_the_middle_and_on_two_ranks_in_the_same_order(
    stages, models, mixtures, trained
):
    whole = [line["loss"] for line in stages.metrics(trained["sft"])]
    assert [line["loss"] for line in stages.metrics(trained["sft-cut"])] == whole
    [two] = stages.run(make(SFTJob, models, mixtures["sft"], epochs=5), ranks=2)
    np.testing.assert_allclose([m["loss"] for m in stages.metrics(two)], whole, rtol=1e-4)
