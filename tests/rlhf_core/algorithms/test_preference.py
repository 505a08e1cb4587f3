"""DPO, SimPO, ORPO and KTO as real jobs on real ranks."""

import numpy as np
import pytest

from rlhf_core.jobs import DPOJob, KTOJob, LoRA, ORPOJob, Resources, SimPOJob
from tests.rlhf_core.torchrun import run_ranks

pytestmark = pytest.mark.slow

ALGORITHMS = {"dpo": DPOJob, "simpo": SimPOJob, "orpo": ORPOJob, "kto": KTOJob}
STEPS = 6
# Stages that differ in placement alone have one key; more epochs than are run give another one.
MICRO, TWO, CUT = 30, 40, 50


def make(models, inputs, algorithm, epochs=20, place=None, **settings):
    place = {"micro_batch_size": 4, "checkpoint_every": 1000, "threads": 1} | (place or {})
    data = inputs["unpaired" if algorithm == "kto" else "preference"]
    values = {
        "model": models["llama"], "data": data, "batch_size": 8, "epochs": epochs,
        "max_steps": STEPS, "learning_rate": 1e-3, "precision": "fp32", "schedule": "linear",
        "warmup_fraction": 0.0, "resources": Resources(**place),
    }  # fmt: skip
    return ALGORITHMS[algorithm](**(values | settings))


def variants(models, data):
    """What one rank runs, in one process: name -> job."""
    lora, long = LoRA(rank=2, alpha=8), {"max_steps": 24, "schedule": "constant"}
    jobs = {name: make(models, data, name) for name in ALGORITHMS}
    jobs |= {
        f"{name}-micro-{size}": make(
            models, data, name, epochs=MICRO + size, place={"micro_batch_size": size}
        )
        for name in ALGORITHMS for size in (1, 2)
    }  # fmt: skip
    jobs |= {f"{name}-learns": make(models, data, name, **long) for name in ALGORITHMS}
    jobs |= {
        f"{name}-lora-learns": make(models, data, name, lora=lora, **long | {"learning_rate": 1e-2})
        for name in ALGORITHMS
    }
    return jobs | {
        "ipo-learns": make(models, data, "dpo", loss="ipo", **long),
        "cdpo-learns": make(models, data, "dpo", label_smoothing=0.2, **long),
        "kto-pairs-learns": make(models, data, "kto", data=data["preference"], **long),
        "dpo-top-learns": make(models, data, "dpo", trainable_layers=1, **long),
        "dpo-bf16": make(models, data, "dpo", precision="bf16"),
        "dpo-bf16-zero2": make(
            models, data, "dpo", epochs=21, precision="bf16", place={"strategy": "zero2"}
        ),
    }  # fmt: skip


@pytest.fixture(scope="module")
def one_rank(stages, models, data):
    """Name -> artifact; those that end in -cut were cut off after step 5 and started again."""
    jobs = variants(models, data)
    cut = {
        f"{name}-cut": make(models, data, name, epochs=CUT, place={"checkpoint_every": 2})
        for name in ALGORITHMS
    }
    folders = {name: stages.write(job) for name, job in (jobs | cut).items()}
    files = [str(folders[name] / "job.json") for name in (*jobs, *cut)]
    files[len(jobs) : len(jobs)] = ["--cut", "5"]
    done = run_ranks(1, "tests.rlhf_core.algorithms.interrupted", *files, env=stages.env)
    assert done.stdout.count("going on from the checkpoint after step 4") == len(cut)
    return {name: stages.result(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def two_ranks(stages, models, data):
    jobs = {f"{name}-ddp": make(models, data, name, epochs=TWO) for name in ALGORITHMS}
    for name in ("dpo", "kto"):
        jobs[f"{name}-zero2"] = make(
            models, data, name, epochs=TWO + 1, place={"strategy": "zero2"}
        )
    return dict(zip(jobs, stages.run(*jobs.values(), ranks=2), strict=True))


def curve(stages, artifact, name="loss"):
    return [m[name] for m in stages.metrics(artifact)]


def assert_same(stages, a, b):
    """Equal but for rounding, which alone decides the accuracy of margins of 0: curves, weights."""
    names = ("loss", "margin", "chosen_reward", "rejected_reward", "grad_norm")
    for first, second in zip(stages.metrics(a), stages.metrics(b), strict=True):
        for name in names:
            if name in first or name in second:  # a batch may hold replies of one kind only
                np.testing.assert_allclose(
                    first[name], second[name], rtol=1e-4, atol=2e-4, err_msg=name
                )
    first, second = stages.weights(a), stages.weights(b)
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_allclose(value, second[name], atol=2e-4, err_msg=name)


@pytest.mark.parametrize(
    "variant",
    ["dpo", "ipo", "cdpo", "simpo", "orpo", "kto", "kto-pairs", "dpo-top",
     "dpo-lora", "simpo-lora", "orpo-lora", "kto-lora"],
)  # fmt: skip
def test_training_prefers_what_wins(stages, one_rank, variant):
    artifact = one_rank[f"{variant}-learns"]
    lines = stages.metrics(artifact)
    gaps = [
        m["chosen_reward"] - m["rejected_reward"]
        for m in lines
        if "chosen_reward" in m and "rejected_reward" in m
    ]
    assert np.mean(gaps[-4:]) > gaps[0] + 0.2, gaps
    metrics = artifact.metadata["metrics"]
    assert metrics["steps"] == 24
    assert metrics["heldout_accuracy"] > (0.6 if variant.startswith("kto") else 0.9), metrics
    assert metrics["heldout_margin"] > 0.1, metrics
    assert np.mean(curve(stages, artifact)[-4:]) < lines[0]["loss"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_adapter_lies_beside_the_merged_weights(one_rank, algorithm):
    assert one_rank[f"{algorithm}-lora-learns"].file("adapter/adapter_model.safetensors").size > 0
    assert one_rank[f"{algorithm}-lora-learns"].file("model.safetensors").size > 0


def test_orpo_fine_tunes_beside(stages, one_rank):
    nll = curve(stages, one_rank["orpo-learns"], "nll")
    assert nll[-1] < nll[0] - 0.5
    first = stages.metrics(one_rank["orpo-learns"])[0]
    assert first["loss"] == pytest.approx(first["nll"] + 0.1 * first["odds_loss"], abs=1e-5)
    assert one_rank["orpo-learns"].metadata["metrics"]["heldout_nll"] < nll[0]


@pytest.mark.parametrize(
    "variant", ["dpo", "kto", "dpo-lora-learns", "kto-lora-learns", "dpo-top-learns"]
)
def test_training_starts_at_the_reference(stages, one_rank, variant):
    first = stages.metrics(one_rank[variant])[0]
    for name in ("chosen_reward", "rejected_reward", "margin"):
        assert abs(first.get(name, 0.0)) < 1e-5, first


@pytest.mark.parametrize("variant", ["dpo-bf16", "dpo-bf16-zero2"])
def test_reference_is_in_the_arithmetic_of_the_policy(stages, one_rank, variant):
    """Else the whole difference between bf16 and fp32 would stand in every reward."""
    first, *_, last = stages.metrics(one_rank[variant])
    assert abs(first["chosen_reward"]) < 5e-3 and abs(first["rejected_reward"]) < 5e-3, first
    assert last["margin"] > 0.1


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_micro_batches_do_not_change_the_result(stages, one_rank, algorithm, size):
    assert_same(stages, one_rank[f"{algorithm}-micro-{size}"], one_rank[algorithm])


@pytest.mark.parametrize(
    ("algorithm", "strategy"),
    [*((name, "ddp") for name in ALGORITHMS), ("dpo", "zero2"), ("kto", "zero2")],
)
def test_two_ranks_train_as_one_does(stages, one_rank, two_ranks, algorithm, strategy):
    assert_same(stages, two_ranks[f"{algorithm}-{strategy}"], one_rank[algorithm])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_cut_off_and_started_again_ends_in_the_same_bytes(stages, one_rank, algorithm):
    whole, cut = one_rank[algorithm], one_rank[f"{algorithm}-cut"]
    assert cut.files == whole.files, "the weights, and the metrics of every step"
    assert cut.metadata["metrics"] == whole.metadata["metrics"]
    assert len(stages.metrics(whole)) == STEPS


def test_top_layers_leave_the_lower_ones_untouched(stages, models, one_rank):
    before = stages.weights(stages.store.get(models["llama"]))
    after = stages.weights(one_rank["dpo-top-learns"])
    changed = {n for n in before if not np.array_equal(before[n], after[n])}
    top = (".layers.2.", "model.norm.weight", "lm_head.weight")  # the tiny model's head is untied
    assert changed and all(any(t in n for t in top) for n in changed), changed
