"""How often voters and the reward model agree."""

from __future__ import annotations

import pytest

from rlhf_core.data.sources.feedback import Candidate
from rlhf_core.data.sources.votes import Undecided, Vote, save_undecided, save_vote
from rlhf_core.evaluation.statistics import accuracy
from rlhf_core.jobs.ensemble import CombineSettings
from rlhf_core.playground.agreement import Agreement
from rlhf_core.playground.catalogue import RewardModels, RunChoices
from rlhf_core.store import open_store

PROMPT = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "store"))


def run(*reward_models, id="r1"):
    scored = RewardModels(reward_models, CombineSettings()) if reward_models else None
    return RunChoices(id, id, (), scored)


def vote(store, better, other, **details):
    pair = [Candidate(text, "M", "d", score) for text, score in (("a", better), ("b", other))]
    save_vote(store, Vote(PROMPT, *pair, details))


def test_share_of_votes_that_the_reward_model_shares(store):
    agreement = Agreement(store, accuracy)
    assert agreement.of(run("rm")) is None
    for better, other in ((2.0, 1.0), (0.5, -1.0), (3.0, 2.5), (-1.0, 0.0)):
        vote(store, better, other, reward_models=["rm"])
    vote(store, 1.0, 1.0, reward_models=["rm"])  # no preference: half
    found = agreement.of(run("rm"))
    assert found["accuracy"] == pytest.approx(3.5 / 5) and found["n"] == 5
    assert found["low"] == pytest.approx(0.31, abs=0.02)  # Wilson, 3.5 of 5
    assert found["high"] == pytest.approx(0.93, abs=0.02)


def test_votes_without_scores_of_these_reward_models_do_not_count(store):
    vote(store, 2.0, 1.0, reward_models=["rm"])
    vote(store, 1.0, 2.0, reward_models=["another"])
    vote(store, 1.0, 2.0, reward_models=["rm", "rm-2"])
    vote(store, None, 2.0, reward_models=["rm"])
    vote(store, 1.0, 2.0, run="r1")  # as older versions wrote it
    replies = [Candidate("a", "M", "d", 1.0), Candidate("b", "N", "e", 2.0)]
    save_undecided(store, Undecided(PROMPT, replies, "tie", {"reward_models": ["rm"]}))
    agreement = Agreement(store, accuracy)
    assert (agreement.of(run("rm"))["accuracy"], agreement.of(run("rm"))["n"]) == (0.5, 2)
    assert agreement.of(run("rm", id="r2"))["n"] == 1
    assert agreement.of(run("rm", "rm-2"))["n"] == 1
    assert agreement.of(run()) is None
