"""Thumbs in a store, and the data set that they are."""

from __future__ import annotations

import pytest

from rlhf_core.data.check import check_source
from rlhf_core.data.dataset.reading import Rows
from rlhf_core.data.fingerprint import fingerprint
from rlhf_core.data.sources.feedback import Candidate
from rlhf_core.data.sources.thumbs import THUMBS, Thumb, save_thumb
from rlhf_core.data.sources.votes import Vote, save_vote
from rlhf_core.errors import DataError
from rlhf_core.jobs import DataJob, DataSettings, PipelineConfig
from rlhf_core.preflight.check import check
from rlhf_core.runtime.context import StageContext
from rlhf_core.stages.prepare_data import run
from rlhf_core.store import open_store
from tests.rlhf_core.data.helpers import byte_tokenizer

SOURCE = DataSettings(source="playground-thumbs")


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "store"))


def thumb(question="How are you?", reply="Fine, thanks.", good=True):
    return Thumb(
        [{"role": "user", "content": question}], Candidate(reply, "PPO", "a" * 64, 0.5), good,
        {"run": "r1"},
    )  # fmt: skip


def test_thumb_keeps_what_was_seen(store):
    record = store.read_record(save_thumb(store, thumb(good=False)))
    assert record.pop("time") and len(record.pop("id")) == 32
    assert record == {
        "prompt": [{"role": "user", "content": "How are you?"}], "completion": "Fine, thanks.",
        "label": False, "model": {"name": "PPO", "digest": "a" * 64, "score": 0.5}, "run": "r1",
    }  # fmt: skip
    assert THUMBS.count(store) == 1


def test_empty_reply_is_not_judged(store):
    with pytest.raises(DataError, match="the reply is empty"):
        save_thumb(store, thumb(reply=" \n"))
    assert THUMBS.count(store) == 0


def test_new_thumb_changes_the_fingerprint_a_vote_does_not_and_none_is_an_error(store):
    [problem] = check_source(SOURCE, "unpaired", store)
    assert "playground-thumbs: there are no thumbs in file://" in problem
    save_thumb(store, thumb())
    first = fingerprint(SOURCE, store)
    assert first.startswith("thumbs:") and check_source(SOURCE, "unpaired", store) == []
    prompt, other = thumb().prompt, Candidate("No.", "SFT", "b" * 64)
    save_vote(store, Vote(prompt, thumb().reply, other))
    assert fingerprint(SOURCE, store) == first
    save_thumb(store, thumb("And you?"))
    assert fingerprint(SOURCE, store) != first


def test_kto_data_set_is_prepared_from_the_thumbs_that_the_run_began_with(store, tmp_path):
    save_thumb(store, thumb())
    save_thumb(store, thumb(reply="Go away.", good=False))
    byte_tokenizer().save_pretrained(tmp_path / "model")
    model = store.publish(tmp_path / "model", kind="model")
    job = DataJob(
        source="playground-thumbs", purpose="unpaired", model=model.digest, heldout_fraction=0.0,
        fingerprint=fingerprint(SOURCE, store),
    )  # fmt: skip
    save_thumb(store, thumb("Later?"))
    context = StageContext(store=store, key=job.key(), folder=tmp_path / "job")
    rows = Rows(store.fetch(run(job, context).digest), "train", "unpaired")
    found = {(r["completion"], r["label"]) for r in rows}
    assert found == {("Fine, thanks.", True), ("Go away.", False)}
    tokenizer = byte_tokenizer()
    end = tokenizer.eos_token_id
    row = next(r for r in rows if not r["label"])
    assert row["completion_ids"] == [*tokenizer("Go away.")["input_ids"], end]


def test_a_run_with_kto_on_thumbs_passes_its_preflight_once_there_are_some(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_HOME", str(tmp_path / "home"))
    config = PipelineConfig(
        store=str(tmp_path / "store"), stages=["sft", "kto"], data={"unpaired": SOURCE.model_dump()}
    )
    found = [p for p in check(config) if "data.unpaired" in p]
    assert len(found) == 1 and "there are no thumbs" in found[0]
    save_thumb(open_store(config.store), thumb())
    assert [p for p in check(config) if "data.unpaired" in p] == []
