"""Online DPO with a judge that compares the replies: settings, verdicts, key and keys."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from rlhf_core.errors import JudgeError
from rlhf_core.jobs.judging import EndpointJudgeSettings
from rlhf_core.jobs.online_dpo import OnlineDPOJob, OnlineDPOSettings
from rlhf_core.training.online.experience import Experience
from rlhf_core.training.online.pair_judge import PairJudge
from rlhf_core.training.online.pairs import pick
from rlhf_core.training.online.sampling import GlobalRollout
from tests.rlhf_core.rewards.standin import StandIn

TEMPLATE = "{prompt}\n{first}\n{second}\n[[A]] [[B]]"
JUDGE = {"url": "http://localhost:1/v1", "model": "m"}
DIGESTS = {"model": "a" * 64, "prompts": "b" * 64}


class Alone:
    """One rank."""

    rank, size = 0, 1

    def gather_beside(self):
        return lambda value: [value]


class Letters:
    """A tokenizer whose token i is the i-th letter."""

    def decode(self, ids, skip_special_tokens):
        return "".join("abcdefgh"[i] for i in ids)


def experience(replies):
    """Replies (token ids) of which two follow each prompt; nothing else is read."""
    count = len(replies)
    rows = [{"prompt": json.dumps([{"role": "user", "content": str(i // 2)}])} for i in
            range(count)]  # fmt: skip
    rollout = GlobalRollout(
        rows=rows, sequences=[[7, *ids] for ids in replies], prompt_lengths=[1] * count,
        logprobs=[[0.0] * len(ids) for ids in replies], finished=torch.ones(count).bool(),
        began=0.0, seconds=0.0,
    )  # fmt: skip
    empty = torch.zeros(count, 1)
    return Experience(
        rollout, empty.bool(), empty, empty, None, None, {}, empty[:, 0], empty[:, 0], {}, None,
        empty.bool(),
    )  # fmt: skip


def compared(verdict, replies, **settings):
    """What a judge makes of them; verdict: prompt, first, second -> answer."""

    def answer(path, body):
        prompt, first, second, _ = body["messages"][0]["content"].splitlines()
        text = verdict(prompt, first, second)
        return {"choices": [{"message": {"content": text}}], "usage": {"total_tokens": 7}}

    server = StandIn(answer)
    asked = {"url": f"{server.url}/v1", "model": "m", "template": TEMPLATE, "retries": 0}
    judge = PairJudge(EndpointJudgeSettings(**asked | settings), Alone(), Letters())
    try:
        found, metrics = judge.compare(experience(replies))
    finally:
        server.close()
    del metrics["judge_seconds"]
    return found.scores, metrics


def shorter(prompt, first, second):
    """Fair; equal lengths are judged by their place."""
    return "[[A]]" if len(first) <= len(second) else "[[B]]"


def test_reply_that_wins_in_both_orders_is_the_better_one():
    replies = [[0], [1, 2], [1, 2], [0], [3, 3], [4, 4], [5], [5]]
    scores, metrics = compared(shorter, replies)
    assert scores.tolist() == [1.0, 0.0, 0.0, 1.0, 0.5, 0.5, 0.5, 0.5]
    assert metrics == {
        "judge_agreed": 0, "judge_by_position": 1, "judge_half": 0, "judge_identical": 1,
        "judge_unclear": 0, "judge_requests": 6, "judge_tokens_per_pair": 6 * 7 / 4,
    }  # fmt: skip
    pairs = pick(scores, 0.0, torch.ones(8).bool())
    assert pairs.chosen.tolist() == [0, 3] and pairs.rejected.tolist() == [1, 2]
    assert pairs.ties == 0.5


def test_one_answer_without_a_verdict_is_a_tie_and_two_end_the_stage():
    """Of a small rollout one is more than 5 %."""
    replies = [[0], [1, 2], [3], [4, 5]]
    once = lambda p, a, b: "hm" if (p, a) == ("0", "a") else shorter(p, a, b)  # noqa: E731
    scores, metrics = compared(once, replies)
    assert scores.tolist() == [0.5, 0.5, 1.0, 0.0]
    assert metrics["judge_unclear"] == metrics["judge_half"] == 1
    twice = lambda p, a, b: "hm" if p == "0" else shorter(p, a, b)  # noqa: E731
    with pytest.raises(JudgeError, match="2 of 4 answers of m at"):
        compared(twice, replies)


def test_ranks_other_than_the_first_take_its_verdicts():
    """The verdicts come by a gather: of what rank 1 hands over nothing is read."""
    given = ([0.0, 0.5], {"judge_requests": 4.0})
    second = SimpleNamespace(rank=1, gather_beside=lambda: lambda value: [given, value])
    found, metrics = PairJudge(EndpointJudgeSettings(**JUDGE), second, None).compare(
        experience([[0], [1], [2], [3]])
    )
    assert found.scores.tolist() == found.raw_scores.tolist() == [0.0, 1.0, 0.5, 0.5]
    assert metrics == given[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "judge is set and rewards has model, but one of the two says"),
        ({"rewards": [], "judge": None}, "rewards and judge are both empty"),
        ({"rewards": [], "min_margin": 0.1}, "min_margin is set with a judge"),
        ({"rewards": [], "eval_every": 2}, "eval_every is set with a judge"),
        ({"rewards": [], "score_whiten": True}, "score_whiten is set with a judge"),
        ({"rewards": [], "curriculum": {}}, "curriculum is set with a judge"),
        ({"rewards": [], "score_clip": 1.0}, "rewards has no entry of type model"),
        ({"rewards": [], "environment": {"type": "calculator", "max_episode_tokens": 512}},
         "environment is set with a judge"),
        ({"rewards": [], "judge": JUDGE | {"type": "rubric"}}, "Input should be 'endpoint'"),
    ],
)  # fmt: skip
def test_settings_that_a_judge_excludes_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        OnlineDPOSettings(**{"judge": JUDGE} | settings)


def test_key_covers_the_judge_and_not_how_it_is_asked():
    def key(**changes):
        return OnlineDPOJob(**DIGESTS, rewards=[], judge=JUDGE | changes).key()

    assert key() == key(timeout=5, retries=0, parallel=1, key_variable="A", max_unclear=0.5)
    assert len({key(), key(model="n"), key(url="http://other/v1"), key(template=TEMPLATE)}) == 4
    plain = OnlineDPOJob(**DIGESTS, rewards=[{"type": "repetition"}])
    assert "judge" not in plain.key_settings()
