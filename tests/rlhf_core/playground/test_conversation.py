"""What a vote makes of a turn, and what models go on from."""

from __future__ import annotations

import html
import re

import pytest

from rlhf_core.playground.catalogue import Choice
from rlhf_core.playground.conversation import Conversation
from rlhf_core.playground.render import bubbles, shown_name
from rlhf_core.playground.replies import PartialReply
from rlhf_core.playground.texts import LANGUAGES, TEXTS, language_of, translate

CHOICES = [Choice("SFT", "a" * 64), Choice("PPO", "b" * 64), Choice("DPO", "c" * 64)]


def turn(conversation, text, replies, common=True, system=None):
    asked = conversation.begin(text, common, system)
    grown = [
        PartialReply(reply, "failed" if reply is None else "done", score=float(i))
        for i, reply in enumerate(replies)
    ]
    conversation.finish(grown)
    return asked


def said(history):
    return [message["content"] for message in history]


def test_vote_pairs_the_best_with_each_other():
    conversation = Conversation.of(CHOICES)
    turn(conversation, "Hi", ["one", "two", "three"], system="Be kind")
    votes = conversation.vote(1, {})
    assert [(v.chosen.text, v.rejected.text) for v in votes] == [("two", "one"), ("two", "three")]
    assert votes[0].prompt == [
        {"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hi"}
    ]  # fmt: skip
    assert (votes[0].chosen.model, votes[0].chosen.score) == ("PPO", 1.0)
    assert conversation.vote_obstacle() == "voted"


def test_vote_that_could_not_be_saved_is_repeated_and_no_other_one_is_possible():
    conversation = Conversation.of(CHOICES)
    turn(conversation, "Hi", ["one", "two", "three"])
    votes = conversation.vote(1, {})
    conversation.best = None  # one of the two was saved
    assert [conversation.can_vote(i) for i in range(3)] == [False, True, False]
    assert not conversation.can_vote("tie")
    assert [again.attempt for again in conversation.vote(1, {})] == [v.attempt for v in votes]
    turn(conversation, "More", ["one", "two", "three"])
    assert conversation.can_vote(0) and conversation.can_vote("both_bad")
    tie = conversation.undecided("tie", {})
    conversation.verdict = None
    assert conversation.undecided("tie", {}) is tie and not conversation.can_vote(0)


def test_all_go_on_from_the_reply_that_was_voted_for():
    conversation = Conversation.of(CHOICES[:2])
    turn(conversation, "Hi", ["one", "two"])
    conversation.vote(1, {})
    asked = turn(conversation, "More", ["three", "four"])
    assert [said(a) for a in asked] == [["Hi", "two", "More"]] * 2
    assert conversation.vote_obstacle() == ""
    asked = turn(conversation, "Again", ["five", "six"])  # no vote: from the left one
    assert [said(a)[-2] for a in asked] == ["three", "three"]


def test_models_that_went_their_own_ways_are_no_pair():
    conversation = Conversation.of(CHOICES[:2])
    turn(conversation, "Hi", ["one", "two"], common=False)
    asked = turn(conversation, "More", ["three", "four"], common=False)
    assert [said(a) for a in asked] == [["Hi", "one", "More"], ["Hi", "two", "More"]]
    assert conversation.vote_obstacle() == "diverged"


def test_model_that_failed_goes_on_from_one_that_did_not():
    conversation = Conversation.of(CHOICES[:2])
    turn(conversation, "Hi", [None, "two"])
    assert conversation.vote_obstacle() == "failed"
    assert conversation.histories[0] == []
    asked = turn(conversation, "More", ["three", "four"])
    assert [said(a) for a in asked] == [["Hi", "two", "More"]] * 2


@pytest.mark.parametrize(
    ("replies", "vote_obstacle"),
    [(["a", "a"], "identical"), (["a", " "], "empty"), (["a", "b"], ""), (["a"], "nothing")],
)
def test_obstacles_to_a_vote(replies, vote_obstacle):
    conversation = Conversation.of(CHOICES[: len(replies)])
    turn(conversation, "Hi", replies)
    assert conversation.vote_obstacle() == vote_obstacle
    assert Conversation().vote_obstacle() == "nothing"


def test_each_reply_has_one_thumb_and_answers_its_own_conversation():
    conversation = Conversation.of(CHOICES)
    turn(conversation, "Hi", ["one", " ", None], common=False)
    assert [conversation.can_judge(i) for i in range(4)] == [True, False, False, False]
    thumb = conversation.thumb(0, False, {"run": "r"})
    assert (thumb.good, thumb.reply.text, thumb.reply.model) == (False, "one", "SFT")
    assert thumb.prompt == [{"role": "user", "content": "Hi"}] and thumb.details == {"run": "r"}
    assert not conversation.can_judge(0)
    turn(conversation, "More", ["three", "four", "five"], common=False, system="Be kind")
    assert conversation.thumbs == {} and conversation.vote_obstacle() == "diverged"
    assert [conversation.can_judge(i) for i in range(3)] == [True, True, True]
    assert said(conversation.thumb(0, True, {}).prompt) == ["Be kind", "Hi", "one", "More"]
    assert said(conversation.thumb(2, True, {}).prompt) == ["Be kind", "More"]


def test_a_thumb_is_possible_beside_a_vote_and_with_one_model():
    conversation = Conversation.of(CHOICES[:2])
    turn(conversation, "Hi", ["same", "same"])
    assert conversation.vote_obstacle() == "identical" and conversation.can_judge(1)
    conversation.thumb(1, True, {})
    assert conversation.can_judge(0)
    conversation = Conversation.of(CHOICES[:1])
    turn(conversation, "Hi", ["one"])
    assert conversation.vote_obstacle() == "nothing" and conversation.can_judge(0)
    conversation = Conversation.of(CHOICES[:2])
    turn(conversation, "Hi", ["one", "two"])
    conversation.vote(1, {})
    assert conversation.can_judge(0) and conversation.can_judge(1)


def test_scores_stand_under_each_reply_of_each_turn():
    conversation = Conversation.of(CHOICES[:2])
    turn(conversation, "Hi", ["one", "two"], common=False)
    conversation.begin("More", False, None)
    abandoned, right = bubbles(
        "en",
        conversation,
        [PartialReply("<b>x", "generating"), PartialReply(state="failed", error="gone")],
    )
    assert "Reward +0.000" in abandoned[1]["content"] and "Reward +1.000" in right[1]["content"]
    assert abandoned[-1]["content"] == "&lt;b&gt;x"
    assert right[-1]["content"].endswith("cannot reply: gone")


def test_tie_and_both_bad_are_no_pairs_and_end_the_vote():
    conversation = Conversation.of(CHOICES)
    turn(conversation, "Hi", ["one", None, "three"], system="Be kind")
    vote = conversation.undecided("both_bad", {"run": "r"})
    assert [(r.text, r.model, r.score) for r in vote.replies] == [
        ("one", "SFT", 0.0), ("three", "DPO", 2.0)
    ]  # fmt: skip
    assert said(vote.prompt) == ["Be kind", "Hi"] and vote.details == {"run": "r"}
    assert (vote.verdict, conversation.vote_obstacle()) == ("both_bad", "voted")
    turn(conversation, "More", ["a", "b", "c"])
    assert conversation.verdict is None and conversation.vote_obstacle() == ""


def test_blind_conversation_hides_names_and_scores_until_the_vote():
    conversation = Conversation.of(CHOICES[:2], blind=True)
    assert conversation.hidden and shown_name("en", conversation, 1) == "Model B"
    turn(conversation, "Hi", ["one", "two"])
    shown = str(bubbles("en", conversation, conversation.last))
    assert conversation.hidden and "Reward" not in shown and "PPO" not in shown
    conversation.thumb(0, True, {})
    assert conversation.hidden
    conversation.vote(1, {})
    assert not conversation.hidden
    assert shown_name("en", conversation, 1) == conversation.choices[1].name
    assert "Reward +1.000" in str(bubbles("en", conversation, conversation.last))
    turn(conversation, "More", ["three", "four"])
    assert conversation.hidden
    assert "Reward +1.000" in str(bubbles("en", conversation, conversation.last)), "earlier turn"
    turn(conversation, "Again", ["same", "same"])
    assert not conversation.hidden, "no vote will come"
    assert not Conversation.of(CHOICES[:1], blind=True).hidden
    assert not Conversation.of(CHOICES[:2]).hidden


def test_blind_conversation_takes_a_new_order_each_turn(monkeypatch):
    monkeypatch.setattr("random.shuffle", lambda items: items.reverse())
    conversation = Conversation.of(CHOICES[:2], blind=True)
    turn(conversation, "Hi", ["one", "two"])
    assert [c.name for c in conversation.choices] == ["PPO", "SFT"]
    [vote] = conversation.vote(0, {})
    assert (vote.chosen.model, vote.chosen.text) == ("PPO", "one")
    asked = turn(conversation, "More", ["three", "four"])
    assert [said(a) for a in asked] == [["Hi", "one", "More"]] * 2
    assert [c.name for c in conversation.choices] == ["SFT", "PPO"]


def test_models_with_histories_of_their_own_keep_their_places(
    monkeypatch,
):
    monkeypatch.setattr("random.shuffle", lambda items: items.reverse())
    conversation = Conversation.of(CHOICES[:2], blind=True)
    turn(conversation, "Hi", ["one", "two"], common=False)
    conversation.vote(0, {})
    order = list(conversation.choices)
    conversation.begin("More", False, None)
    assert conversation.choices == order and not conversation.hidden


def test_reply_is_text_whatever_it_says():
    bad = '<img src=http://x> <form action="http://x"> ![i](http://x) <script>alert(1)</script>'
    conversation = Conversation.of(CHOICES[:2])
    turn(conversation, bad, [bad, "fine"])
    for message in bubbles("en", conversation, conversation.last)[0]:
        tags = re.findall(r"<[^>]*>", message["content"])
        assert set(tags) <= {'<div class="score">', "</div>"}, message
        assert html.unescape(message["content"]).startswith(bad)
    failed = PartialReply(state="failed", error=bad)
    [[_, told], _] = bubbles("en", conversation, [failed, failed])
    assert "<" not in told["content"]


def test_every_text_is_there_in_each_language():
    for key, texts in TEXTS.items():
        assert len(texts) == len(LANGUAGES) and all(texts), key
    assert translate("zh", "score", score=1.0) == "奖励分 +1.000"
    assert [language_of(a) for a in ("zh-CN,zh;q=0.9", "de,zh", "")] == ["zh", "en", "en"]
