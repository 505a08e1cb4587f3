"""Votes in a store, and the data set that they are."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest

from rlhf_core.data.check import check_source
from rlhf_core.data.dataset.reading import Rows
from rlhf_core.data.fingerprint import fingerprint
from rlhf_core.data.sources import feedback
from rlhf_core.data.sources.feedback import Candidate
from rlhf_core.data.sources.votes import VOTES as KEPT
from rlhf_core.data.sources.votes import Undecided, Vote, save_undecided, save_vote
from rlhf_core.errors import DataError, StoreUnavailable
from rlhf_core.jobs import DataJob, DataSettings
from rlhf_core.runtime.context import StageContext
from rlhf_core.stages.prepare_data import run
from rlhf_core.store import open_store
from tests.rlhf_core.data.helpers import byte_tokenizer

VOTES = DataSettings(source="playground-votes")


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "store"))


def vote(question="How are you?", chosen="Fine, thanks.", rejected="No."):
    return Vote(
        [{"role": "user", "content": question}],
        Candidate(chosen, "PPO", "a" * 64, 0.5),
        Candidate(rejected, "SFT", "b" * 64, None),
        {"run": "r1"},
    )


def job_for(store, tmp_path, **settings):
    byte_tokenizer().save_pretrained(tmp_path / "model")
    model = store.publish(tmp_path / "model", kind="model")
    return DataJob(
        source="playground-votes", purpose="preference", model=model.digest,
        heldout_fraction=0.0, **settings,
    )  # fmt: skip


def context(store, tmp_path, job):
    return StageContext(store=store, key=job.key(), folder=tmp_path / "job")


def test_vote_that_is_saved_again_after_an_error_is_one_record(store, monkeypatch):
    """The store may have written it before its answer was lost."""
    create, calls = store._backend.create, []

    def lost(key, data):
        created = create(key, data)
        calls.append(key)
        if len(calls) < 3:
            raise StoreUnavailable("no answer")
        return created

    monkeypatch.setattr(store._backend, "create", lost)
    first, other = vote(), vote("Who?")
    for _ in range(2):  # the second time the answer is that it is there, and is lost too
        with pytest.raises(StoreUnavailable):
            save_vote(store, first)
    save_vote(store, other)
    path = save_vote(store, first)
    assert store.list_records("votes/") == [path, save_vote(store, other)]
    assert store.read_record(path)["prompt"] == first.prompt


def test_vote_keeps_what_was_seen(store):
    path = save_vote(store, vote())
    record = store.read_record(path)
    assert record["prompt"] == [{"role": "user", "content": "How are you?"}]
    assert (record["chosen"], record["rejected"]) == ("Fine, thanks.", "No.")
    assert record["models"]["chosen"] == {"name": "PPO", "digest": "a" * 64, "score": 0.5}
    assert record["models"]["rejected"]["score"] is None
    assert record["run"] == "r1"
    assert KEPT.count(store) == 1


@pytest.mark.parametrize(("chosen", "word"), [(" ", "empty"), ("No. ", "identical")])
def test_vote_that_teaches_nothing_is_refused(store, chosen, word):
    with pytest.raises(DataError, match=word):
        save_vote(store, vote(chosen=chosen))
    assert KEPT.count(store) == 0


def test_new_vote_changes_the_fingerprint_and_no_vote_is_an_error(store):
    with pytest.raises(DataError, match=r"no votes in file://.*rlhf playground"):
        fingerprint(VOTES, store)
    [problem] = check_source(VOTES, "preference", store)
    assert "no votes" in problem
    save_vote(store, vote())
    first = fingerprint(VOTES, store)
    assert fingerprint(VOTES, store) == first
    assert check_source(VOTES, "preference", store) == []
    save_vote(store, vote("And you?"))
    assert fingerprint(VOTES, store) != first


def test_votes_become_preference_rows(store, tmp_path):
    save_vote(store, vote())
    save_vote(store, vote("And you?", "Well.", "Bad."))
    job = job_for(store, tmp_path, fingerprint=fingerprint(VOTES, store))
    folder = store.fetch(run(job, context(store, tmp_path, job)).digest)
    rows = Rows(folder, "train", "preference")
    found = {(r["chosen"], r["rejected"]) for r in rows.take(list(range(len(rows))))}
    assert found == {("Fine, thanks.", "No."), ("Well.", "Bad.")}


def test_run_reads_the_votes_that_it_began_with(store, tmp_path):
    save_vote(store, vote())
    job = job_for(store, tmp_path, fingerprint=fingerprint(VOTES, store))
    later = save_vote(store, vote("Later?"))
    artifact = run(job, context(store, tmp_path, job))
    assert artifact.metadata["rows"]["train"] == 1
    [path] = [p for p in store.list_records("votes/") if p != later]
    store.write_record(path, {**store.read_record(path), "chosen": "Something else."})
    with pytest.raises(DataError, match="no longer those"):
        run(job, context(store, tmp_path, job))


def test_votes_of_the_environments_store_are_read_without_one(store, monkeypatch):
    monkeypatch.setenv("RLHF_STORE", store.url)
    save_vote(store, vote())
    assert fingerprint(VOTES) == fingerprint(VOTES, store)


def test_vote_of_a_writer_with_a_slow_clock_comes_after_what_was_read(store, monkeypatch):
    class Slow(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2001, 1, 1, tzinfo=tz)

    old = "votes/20260301T120000.000000Z-01234567.json"  # as they were named once
    record = store.read_record(save_vote(store, vote("An old one?")))
    store.delete_record("votes/n0000000001.json")
    store.write_record(old, record)
    save_vote(store, vote("Before?"))
    began_with = fingerprint(VOTES, store)
    monkeypatch.setattr(feedback, "datetime", Slow)
    with ThreadPoolExecutor(4) as pages:
        paths = list(pages.map(lambda n: save_vote(store, vote(f"Later {n}?")), range(8)))
    assert len(set(paths)) == 8
    prompts = [row.data["prompt"][-1]["content"] for row in KEPT.rows(store, began_with)]
    assert prompts == ["An old one?", "Before?"]
    assert len(list(KEPT.rows(store))) == 10


def test_ties_and_both_bad_are_counted_in_the_card_and_make_no_pair(store, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_HOME", str(tmp_path / "home"))
    replies = [Candidate("Fine.", "PPO", "a" * 64, 0.5), Candidate("OK.", "SFT", "b" * 64, 0.1)]
    prompt = [{"role": "user", "content": "Hi"}]
    for verdict in ("tie", "both_bad", "tie"):  # first: what detects the format must skip them
        path = save_undecided(store, Undecided(prompt, replies, verdict, {"run": "r1"}))
    record = store.read_record(path)
    assert (record["verdict"], record["replies"]) == ("tie", ["Fine.", "OK."])
    assert record["models"][0] == {"name": "PPO", "digest": "a" * 64, "score": 0.5}
    save_vote(store, vote())
    assert KEPT.count(store) == 4
    job = job_for(store, tmp_path)
    artifact = run(job, context(store, tmp_path, job))
    folder = store.fetch(artifact.digest)
    assert [row["chosen"] for row in Rows(folder, "train", "preference")] == ["Fine, thanks."]
    card = json.loads((folder / "card.json").read_text())
    assert card["read"] == 4 and card["dropped"] == {"tie": 2, "both_bad": 1}
