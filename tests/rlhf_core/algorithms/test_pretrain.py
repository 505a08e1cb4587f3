"""Pretraining as real jobs on real ranks."""

import json
import math

import numpy as np
import pytest

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.data.encoding.tokenizer import load_tokenizer
from rlhf_core.jobs import DataJob, DataSettings, LoRA, NewModelJob, PretrainJob, Resources
from rlhf_core.runtime.rank import run_job
from rlhf_core.training.packing import Packing
from tests.faults.stage import Place
from tests.rlhf_core.algorithms.conftest import talk

pytestmark = pytest.mark.slow

LENGTH, BATCH = 47, 6


def pretrain_job(models, data, **kwargs):
    place = {"micro_batch_size": 3, "checkpoint_every": 2, "threads": 1, "device": "cpu"}
    values = {
        "model": models["llama"], "data": data["pretrain"], "batch_size": BATCH, "epochs": 2,
        "length": LENGTH, "learning_rate": 2e-3, "precision": "fp32", "warmup_fraction": 0.0,
        "resources": Resources(**(place | kwargs.pop("resources", {}))),
    }  # fmt: skip
    return PretrainJob(**(values | kwargs))


@pytest.fixture(scope="module")
def from_nothing(stages):
    """A new model and long documents cut by its own tokenizer: name -> digest."""
    path = stages.folder / "plain-text.jsonl"
    lines = [" ".join(f"{p}. {c}." for p, c in map(talk, range(i, i + 9))) for i in range(40)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    text = DataSettings(source=str(path), max_length=64, heldout_fraction=0.2)

    def result(job):
        folder = stages.write(job)
        run_job(job, stages.store, folder)
        return stages.result(folder).digest

    new = NewModelJob(hidden_size=32, layers=2, heads=2, vocabulary=400, max_length=64, text=text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_HOME", stages.env["RLHF_HOME"])
        model = result(new)
        data = result(DataJob(purpose="pretrain", model=model, **text.model_dump()))
    return {"model": model, "data": data}


@pytest.fixture(scope="module")
def one_rank(stages, models, data, from_nothing):
    """Every variant that one rank runs, in one process: name -> artifact."""
    # A weight decay too small to matter gives what differs in placement only a stage key.
    jobs = {
        "untrained": pretrain_job(models, data, max_steps=1, learning_rate=1e-12),
        "plain": pretrain_job(models, data),
        "micro-1": pretrain_job(
            models, data, weight_decay=0.1 + 1e-9, resources={"micro_batch_size": 1}
        ),
        "lora": pretrain_job(models, data, lora=LoRA(rank=2, alpha=8), learning_rate=1e-2),
        "top": pretrain_job(models, data, trainable_layers=1, learning_rate=1e-2),
        "bloom": pretrain_job(models, data, model=models["bloom"], max_steps=2),
        "from-nothing": pretrain_job(
            {"llama": from_nothing["model"]},
            {"pretrain": from_nothing["data"]},
            length=64,
            batch_size=8,
            epochs=3,
            learning_rate=1e-2,
        ),
    }
    return dict(zip(jobs, stages.run(*jobs.values()), strict=True))


@pytest.fixture(scope="module")
def two_ranks(stages, models, data):
    jobs = {
        kind: pretrain_job(
            models, data, weight_decay=0.1 + i * 1e-9,
            resources={"strategy": kind, "micro_batch_size": 2},
        )
        for i, kind in enumerate(("ddp", "zero2"), 2)
    }  # fmt: skip
    return dict(zip(jobs, stages.run(*jobs.values(), ranks=2), strict=True))


def metric(stages, artifact, name="loss"):
    return [m[name] for m in stages.metrics(artifact)]


def assert_same(stages, a, b):
    np.testing.assert_allclose(metric(stages, a), metric(stages, b), rtol=1e-4)
    first, second = stages.weights(a), stages.weights(b)
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_allclose(value, second[name], atol=2e-4, err_msg=name)


def test_pretraining_lowers_the_heldout_loss(stages, one_rank):
    before = one_rank["untrained"].metadata["metrics"]["heldout_loss"]
    assert abs(before - math.log(960)) < 0.5, "an untrained model knows nothing"
    for name in ("plain", "lora", "top"):
        metrics = one_rank[name].metadata["metrics"]
        assert metrics["heldout_loss"] < before - 0.3, name
        assert metrics["heldout_perplexity"] == pytest.approx(math.exp(metrics["heldout_loss"]))


def test_heldout_loss_is_the_mean_over_documents_that_stand_alone(stages, models, data, one_rank):
    """Computed without packing, from the published folder and the data set alone."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = stages.store.fetch(one_rank["plain"].digest)
    model = AutoModelForCausalLM.from_pretrained(folder)
    end = load_tokenizer(folder).eos_token_id
    rows = Rows(stages.store.fetch(data["pretrain"]), "heldout", "pretrain")
    packing = Packing(rows, end, LENGTH)
    starts = {i * (LENGTH - 1) for i in range(len(packing))}
    loss, tokens, place = 0.0, 0, 0
    for row in rows:  # a document that a sequence cuts goes on without what came before
        ids, part = [end, *row["input_ids"]], 0
        for i in range(len(ids)):
            last = i == len(ids) - 1
            if (last or (place + i in starts and i > 0)) and i > part:
                text = torch.tensor([ids[part : i + 1]])
                with torch.no_grad():
                    loss += float(model(text, labels=text).loss) * (i - part)
                tokens, part = tokens + i - part, i
        place += len(ids) - 1
    found = one_rank["plain"].metadata["metrics"]["heldout_loss"]
    assert found == pytest.approx(loss / tokens, rel=1e-4)
    assert tokens == sum(len(row["input_ids"]) for row in rows)


def test_steps_take_all_sequences(stages, one_rank):
    metrics = one_rank["plain"].metadata["metrics"]
    sequences = metrics["sequences"]
    assert sequences % BATCH % 2 == 1, "two ranks cannot share the last batch evenly"
    assert metrics["steps"] == 2 * math.ceil(sequences / BATCH)
    assert [m["step"] for m in stages.metrics(one_rank["plain"])] == [
        *range(1, metrics["steps"] + 1)
    ]


def test_micro_batches_do_not_change_pretraining(stages, one_rank):
    assert_same(stages, one_rank["micro-1"], one_rank["plain"])


@pytest.mark.parametrize("kind", ["ddp", "zero2"])
def test_two_ranks_pretrain_as_one_does(stages, one_rank, two_ranks, kind):
    assert_same(stages, two_ranks[kind], one_rank["plain"])


def test_documents_are_kept_apart_where_the_architecture_can(one_rank):
    assert one_rank["plain"].metadata["documents_separated"] is True
    assert one_rank["bloom"].metadata["documents_separated"] is False


def test_killed_and_resumed_ends_in_the_same_artifact(stages, models, data, one_rank, tmp_path):
    job = pretrain_job(models, data)
    place = Place(stages.folder, tmp_path / "place")
    (place.folder / "store" / "stages" / f"{job.key()}.json").unlink()
    place.run(job, [{"what": "kill", "target": "rank", "update": 5, "rank": 0}])
    assert place.store.stage_result(job.key()) is None, "it was to be killed before its end"
    place.run(job)
    assert "going on from the checkpoint after step" in place.log()
    assert place.result(job).digest == one_rank["plain"].digest
    assert place.checkpoints(job) == []


def test_model_from_nothing_learns_and_opens_without_this_project(stages, from_nothing, one_rank):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert one_rank["from-nothing"].metadata["metrics"]["heldout_loss"] < math.log(400) - 2
    folder = stages.store.fetch(one_rank["from-nothing"].digest)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("Say apple", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]
    assert stages.store.get(from_nothing["data"]).metadata["metrics"]["kept"] > 60, "cut, not lost"
