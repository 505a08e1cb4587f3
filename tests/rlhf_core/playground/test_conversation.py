"""What a vote makes of a turn, and what models go on from."""

from __future__ import annotations

import pytest

from rlhf_core.playground.asking import PartialReply
from rlhf_core.playground.catalogue import Choice
from rlhf_core.playground.conversation import Conversation
from rlhf_core.playground.render import bubbles
from rlhf_core.playground.texts import LANGUAGES, TEXTS, language_of, say

CHOICES = [Choice("SFT", "a" * 64), Choice("PPO", "b" * 64), Choice("DPO", "c" * 64)]


def turn(talk, text, replies, common=True, system=None):
    asked = talk.begin(text, common, system)
    grown = [
        PartialReply(reply, "failed" if reply is None else "done", score=float(i))
        for i, reply in enumerate(replies)
    ]
    talk.finish(asked, grown)
    return asked


def said(history):
    return [message["content"] for message in history]


def test_vote_pairs_the_best_with_each_other():
    talk = Conversation.of(CHOICES)
    turn(talk, "Hi", ["one", "two", "three"], system="Be kind")
    votes = talk.vote(1, {})
    assert [(v.chosen.text, v.rejected.text) for v in votes] == [("two", "one"), ("two", "three")]
    assert votes[0].prompt == [
        {"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hi"}
    ]  # fmt: skip
    assert (votes[0].chosen.model, votes[0].chosen.score) == ("PPO", 1.0)
    assert talk.obstacle() == "voted"


def test_all_go_on_from_the_reply_that_was_voted_for():
    talk = Conversation.of(CHOICES[:2])
    turn(talk, "Hi", ["one", "two"])
    talk.vote(1, {})
    asked = turn(talk, "More", ["three", "four"])
    assert [said(a) for a in asked] == [["Hi", "two", "More"]] * 2
    assert talk.obstacle() == ""
    asked = turn(talk, "Again", ["five", "six"])  # no vote: from the left one
    assert [said(a)[-2] for a in asked] == ["three", "three"]


def test_models_that_went_their_own_ways_are_no_pair():
    talk = Conversation.of(CHOICES[:2])
    turn(talk, "Hi", ["one", "two"], common=False)
    asked = turn(talk, "More", ["three", "four"], common=False)
    assert [said(a) for a in asked] == [["Hi", "one", "More"], ["Hi", "two", "More"]]
    assert talk.obstacle() == "apart"


def test_model_that_failed_goes_on_from_one_that_did_not():
    talk = Conversation.of(CHOICES[:2])
    turn(talk, "Hi", [None, "two"])
    assert talk.obstacle() == "failed"
    assert talk.histories[0] == []
    asked = turn(talk, "More", ["three", "four"])
    assert [said(a) for a in asked] == [["Hi", "two", "More"]] * 2


@pytest.mark.parametrize(
    ("replies", "obstacle"),
    [(["a", "a"], "identical"), (["a", " "], "empty"), (["a", "b"], ""), (["a"], "nothing")],
)
def test_obstacles_to_a_vote(replies, obstacle):
    talk = Conversation.of(CHOICES[: len(replies)])
    turn(talk, "Hi", replies)
    assert talk.obstacle() == obstacle
    assert Conversation().obstacle() == "nothing"


def test_each_reply_has_one_thumb_and_answers_its_own_conversation():
    talk = Conversation.of(CHOICES)
    turn(talk, "Hi", ["one", " ", None], common=False)
    assert [talk.can_judge(i) for i in range(4)] == [True, False, False, False]
    thumb = talk.thumb(0, False, {"run": "r"})
    assert (thumb.good, thumb.reply.text, thumb.reply.model) == (False, "one", "SFT")
    assert thumb.prompt == [{"role": "user", "content": "Hi"}] and thumb.details == {"run": "r"}
    assert not talk.can_judge(0)
    turn(talk, "More", ["three", "four", "five"], common=False, system="Be kind")
    assert talk.thumbs == {} and talk.obstacle() == "apart"
    assert [talk.can_judge(i) for i in range(3)] == [True, True, True]
    assert said(talk.thumb(0, True, {}).prompt) == ["Be kind", "Hi", "one", "More"]
    assert said(talk.thumb(2, True, {}).prompt) == ["Be kind", "More"]


def test_a_thumb_is_possible_beside_a_vote_and_with_one_model():
    talk = Conversation.of(CHOICES[:2])
    turn(talk, "Hi", ["same", "same"])
    assert talk.obstacle() == "identical" and talk.can_judge(1)
    talk.thumb(1, True, {})
    assert talk.can_judge(0)
    talk = Conversation.of(CHOICES[:1])
    turn(talk, "Hi", ["one"])
    assert talk.obstacle() == "nothing" and talk.can_judge(0)
    talk = Conversation.of(CHOICES[:2])
    turn(talk, "Hi", ["one", "two"])
    talk.vote(1, {})
    assert talk.can_judge(0) and talk.can_judge(1)


def test_scores_stand_under_each_reply_of_each_turn():
    talk = Conversation.of(CHOICES[:2])
    turn(talk, "Hi", ["one", "two"], common=False)
    asked = talk.begin("More", False, None)
    left, right = bubbles(
        "en",
        talk,
        asked,
        [PartialReply("<b>x", "talking"), PartialReply(state="failed", error="gone")],
    )
    assert "Reward +0.000" in left[1]["content"] and "Reward +1.000" in right[1]["content"]
    assert left[-1]["content"] == "<b>x"
    assert right[-1]["content"].endswith("cannot answer: gone")


def test_every_text_is_there_in_each_language():
    for key, texts in TEXTS.items():
        assert len(texts) == len(LANGUAGES) and all(texts), key
    assert say("zh", "score", score=1.0) == "奖励分 +1.000"
    assert [language_of(a) for a in ("zh-CN,zh;q=0.9", "de,zh", "")] == ["zh", "en", "en"]
