"""Services are asked while the rollout goes on, and the numbers do not depend on when."""

from __future__ import annotations

import json
import threading
import time

import pytest
import torch

from rlhf_core.errors import DataError
from rlhf_core.jobs.reward_services import CodeReward, HttpReward
from rlhf_core.rewards.services import Services
from rlhf_core.rollout.finished import FinishedReply
from rlhf_core.rollout.generate import generate
from rlhf_core.training.online.service_rewards import asking, service_scores
from tests.rlhf_core.nn.test_response_logprobs import make_model
from tests.rlhf_core.rewards.standin import StandIn

PROMPTS = [[5, 9, 11], [7], [30, 31, 32], [8, 8], [64, 3], [12, 40]]
ROWS = [{"prompt": json.dumps([{"role": "user", "content": str(p)}]), "row": i}
        for i, p in enumerate(PROMPTS)]  # fmt: skip


class Words:
    """A tokenizer whose text is the ids."""

    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids))


class Alone:
    """One rank."""

    rank, size = 0, 1

    def gather(self, value):
        return [value]

    def in_order(self, mine):
        return [value for _, value in sorted(mine)]


class Seen(Exception):
    """The positions that a rank reads."""


class Second:
    """The second of two ranks; the first one holds the answers about replies 1 and 3."""

    rank, size = 1, 2

    def gather(self, value):
        return [[1, 3], value]

    def in_order(self, mine):
        raise Seen(sorted(position for position, _ in mine))


def score(path, body):
    words = [item["reply"].split() for item in body["items"]]
    return {"scores": [float(w[0]) for w in words], "components": {"n": [len(w) for w in words]}}


@pytest.fixture
def start():
    made = []

    def started(answer, **settings):
        server = StandIn(answer)
        services = Services([HttpReward(url=server.url, **settings)])
        made.extend([services, server])
        return server, services

    yield started
    for one in made:
        one.close()


def decode(services=None, before_pass=None):
    """A rollout of six replies, some of which end early."""
    return generate(
        make_model("llama"), PROMPTS, max_new_tokens=12, eos_ids=set(range(10, 20)), pad_id=0,
        row_seeds=range(11, 17), before_pass=before_pass,
        on_finished=asking(services, Words(), ROWS),
    )  # fmt: skip


def replies_of(rollout):
    pairs = zip(rollout.response_ids, rollout.response_mask, strict=True)
    return [ids[real].tolist() for ids, real in pairs]


def test_requests_begin_before_the_rollout_ends_which_waits_for_none(start):
    """The service holds all its answers back until the rollout is over."""
    over, came = threading.Event(), threading.Event()

    def answer(path, body):
        came.set()
        over.wait(20)
        return score(path, body)

    server, services = start(answer, batch_size=1)
    passes = []

    def before_pass():
        passes.append(1)
        if len(passes) > 11:  # of 12: some replies have ended long ago
            assert came.wait(10), "no request came while tokens were decoded"

    rollout = decode(services, before_pass)
    assert len(passes) == 12 and 1 <= len(server.requests) <= len(PROMPTS)
    over.set()
    replies = replies_of(rollout)
    found = service_scores(services, Alone(), Words(), ROWS, replies, rollout.finished.tolist())
    assert found.scores["http"].tolist() == [float(ids[0]) for ids in replies]
    assert found.components == {"http/n": pytest.approx(sum(map(len, replies)) / 6)}
    assert len(server.requests) == len(PROMPTS)
    assert found.metrics().keys() == {"reward_http/n", "services_seconds"}


def test_scores_do_not_depend_on_timing(start):
    """Asked during the rollout with answers in any order, or after it."""
    turns = iter([0.2, 0.0, 0.1, 0.0, 0.15, 0.0] * 4)

    def late(path, body):
        time.sleep(next(turns))
        return score(path, body)

    found = []
    for answer, early in ((late, True), (score, True), (late, False)):
        _, services = start(answer, batch_size=2, parallel=3)
        rollout = decode(services if early else None)
        given = (ROWS, replies_of(rollout), rollout.finished.tolist())
        scores = service_scores(services, Alone(), Words(), *given)
        found.append((scores.scores["http"].tolist(), scores.components))
    assert found[0] == found[1] == found[2]


def test_rank_that_asked_reads_the_answer_and_the_rest_is_spread(start):
    server, services = start(score, batch_size=8)
    replies = [[5, i] for i in range(6)]
    ask = asking(services, Words(), ROWS)
    ask([FinishedReply(i, replies[i], [0.0, 0.0], True) for i in (4, 1)])
    with pytest.raises(Seen) as seen:
        service_scores(services, Second(), Words(), ROWS, replies, [True] * 6)
    assert seen.value.args[0] == [4, 5]  # 4 was asked here; 5 is its share of 0, 2 and 5
    asked = [item["reply"] for _, _, body in server.requests for item in body["items"]]
    assert sorted(asked) == ["5 1", "5 4", "5 5"]


def test_first_rank_reads_all_that_samplers_of_their_own_return(start):
    _, services = start(score)
    services.first_asks = True
    given = (Words(), ROWS, [[5, i] for i in range(6)], [True] * 6)
    with pytest.raises(Seen) as seen:
        service_scores(services, Second(), *given)
    assert seen.value.args[0] == []


def test_row_that_lacks_what_a_service_needs_is_told_after_the_rollout():
    services = Services([CodeReward(url="http://127.0.0.1:9")])
    ids = torch.tensor([[5, 6]])
    try:
        rollout = decode(services)  # goes on
        with pytest.raises(DataError, match="needs tests in column 'answer'"):
            replies = replies_of(rollout)
            service_scores(services, Alone(), Words(), ROWS, replies, [True] * len(ids) * 6)
    finally:
        services.close()
