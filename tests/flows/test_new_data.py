"""What tells a retraining that there is something new: files, votes and thumbs."""

from __future__ import annotations

import pytest

from rlhf_core.data.sources.feedback import Candidate
from rlhf_core.data.sources.thumbs import Thumb, save_thumb
from rlhf_core.data.sources.votes import Vote, save_vote
from rlhf_core.jobs import DataSettings, PipelineConfig

GOOD, BAD = Candidate("Fine, thanks.", "PPO", "a" * 64), Candidate("No.", "SFT", "b" * 64)


def judge(store, source, number):
    prompt = [{"role": "user", "content": f"Question {number}"}]
    if source == "playground-votes":
        save_vote(store, Vote(prompt, GOOD, BAD))
    else:
        save_thumb(store, Thumb(prompt, BAD, False))


@pytest.mark.slow
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("source", ["playground-votes", "playground-thumbs"])
def test_watcher_sees_what_people_said_in_the_store_that_it_is_given(
    prefect_server, store, tmp_path, monkeypatch, source, mixed
):
    from flows.watch_data import rlhf_watch_data

    monkeypatch.setenv("RLHF_STORE", str(tmp_path / "another"))
    watched = ["builtin:chatterbot", source] if mixed else source
    names = []
    for number in (0, None, 1):
        if number is not None:
            judge(store, source, number)
        names.append(rlhf_watch_data(watched, store=store.url, return_state=True).name)
    assert names == ["Completed", "NothingNew", "NewData"]


@pytest.mark.parametrize(
    ("source", "part"), [("playground-votes", "preference"), ("playground-thumbs", "unpaired")]
)
def test_retraining_takes_new_votes_and_thumbs_for_new_data(store, source, part):
    from flows.retrain import _source_state

    given = {part: DataSettings(source=source)}
    config = PipelineConfig(stages=["sft", "kto"], data=given)
    judge(store, source, 0)
    first = _source_state(config, store)
    assert _source_state(config, store) == first
    judge(store, source, 1)
    assert _source_state(config, store) != first
