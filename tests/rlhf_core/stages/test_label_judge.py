"""Judges behind endpoints as labellers, against a stand-in over real HTTP."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from rlhf_core.jobs import LabelJob, SampledPreferences
from rlhf_core.jobs.judging import EndpointJudgeSettings, RubricJudgeSettings
from rlhf_core.rollout.replies import Reply
from rlhf_core.stages.label import make_labeller
from rlhf_core.stages.label_judge import better_and_worse
from tests.rlhf_core.rewards.standin import StandIn

D = "0" * 64
WORDS = ["", "a", "bb", "ccc", "dddd"]  # token id -> text


class Words:
    """A tokenizer whose token i is a text of i letters."""

    def decode(self, ids, skip_special_tokens):
        return "".join(WORDS[i] for i in ids)


class Alone:
    """One rank."""

    rank, size = 0, 1

    def gather_beside(self):
        return lambda value: [value]


class Context:
    """A stage's folder, and what it closes."""

    def __init__(self, folder):
        from contextlib import ExitStack

        self.folder, self.closing = folder, ExitStack()


ROWS = [{"prompt": json.dumps([{"role": "user", "content": str(i)}]), "row": i} for i in range(2)]


def chat(of):
    """A server whose answer is a function of the last message's lines."""

    def answer(path, body):
        text = of(*body["messages"][0]["content"].splitlines()[:-1])
        return {"choices": [{"message": {"content": text}}], "usage": {"total_tokens": 7}}

    return StandIn(answer)


def label(judge, replies, tmp_path, best_worst=False, **settings):
    """Decisions about groups of replies (token ids), and the counts."""
    job = LabelJob(
        model=D, prompts=D, labeller="endpoint", judge=judge, samples_per_prompt=len(replies[0]),
        **settings,
    )  # fmt: skip
    context = Context(tmp_path)
    labeller = make_labeller(job, context, Alone(), Words())
    flat = [Reply([i], 0.0, True) for group in replies for i in group]
    rows = [row for row in ROWS[: len(replies)] for _ in replies[0]]
    with context.closing:
        return labeller.decide(rows, flat, best_worst), labeller.totals()


def longer(prompt, first, second):
    """Fair, but "bb" and "ccc" are judged by their place."""
    if {first, second} == {"bb", "ccc"}:
        return "[[A]]"
    return "[[A]]" if len(first) > len(second) else "[[B]]"


def comparing(server):
    template = "{prompt}\n{first}\n{second}\n[[A]] [[B]]"
    return EndpointJudgeSettings(url=f"{server.url}/v1", model="m", template=template)


def test_judge_compares_every_two_replies_in_both_orders(tmp_path):
    server = chat(longer)
    (first, second), counts = label(comparing(server), [[1, 2, 3], [4, 4, 1]], tmp_path)
    server.close()
    assert sorted(first[0]) == [(1, 0, 1.0), (2, 0, 1.0)] and first[1] == 1  # 2 or 3: by position
    assert sorted(second[0]) == [(0, 2, 1.0), (1, 2, 1.0)] and second[1] == 1  # identical
    assert counts == {
        "requests": 10, "tokens": 70, "pairs": 6, "agreed": 0, "by_position": 1, "half": 0,
        "identical": 1, "unclear": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("results", "kept", "ties"),
    [
        ({(0, 1): 1.0, (0, 2): 1.0, (1, 2): 0.5}, [(0, 2)], 0),  # of equals the last is the worst
        ({(0, 1): 0.0, (0, 2): 0.0, (1, 2): 1.0}, [(1, 0)], 0),
        ({(0, 1): 0.5, (0, 2): 0.5, (1, 2): 0.5}, [], 1),
        ({(0, 1): 1.0, (0, 2): 0.0, (1, 2): 1.0}, [], 1),  # in a circle: each has one win
    ],
)
def test_best_and_worst_of_a_heldout_prompt(results, kept, ties):
    assert better_and_worse(results, 3, best_worst=True) == (kept, ties)


def test_judge_rates_replies_and_a_second_start_asks_nothing(tmp_path):
    def rate(prompt, reply):
        return "no idea" if reply == "a" else f"[[{1 + 3 * (len(reply) - 1)}]]"

    server = chat(rate)
    judge = RubricJudgeSettings(
        url=f"{server.url}/v1", model="m", retries=0, template="{prompt}\n{reply}\n[[5]]"
    )
    given = judge, [[1, 2, 3, 4]], tmp_path
    ((kept, too_close),), counts = label(*given, min_margin=0.4, margins=True)
    assert [(b, w) for b, w, _ in kept] == [(3, 1), (3, 0), (2, 0)] and too_close == 3
    assert [margin for *_, margin in kept] == pytest.approx([2 / 3, 1.0, 2 / 3])
    assert counts == {"replies": 4, "tokens": 28, "unclear": 1}
    asked = len(server.requests)
    assert label(*given, min_margin=0.4) == (([(kept, too_close)]), counts)
    assert len(server.requests) == asked == 4
    server.close()


def test_settings_of_the_judge_fit_together():
    rubric = RubricJudgeSettings(url="http://host/v1", model="m")
    pairs = EndpointJudgeSettings(url="http://host/v1", model="m")
    with pytest.raises(ValidationError, match="labeller is endpoint and judge is empty"):
        SampledPreferences(labeller="endpoint")
    with pytest.raises(ValidationError, match="labeller is vader and judge is set"):
        SampledPreferences(judge=rubric)
    with pytest.raises(ValidationError, match="a judge that compares gives no scores"):
        LabelJob(model=D, prompts=D, labeller="endpoint", judge=pairs, margins=True)
    assert SampledPreferences(labeller="endpoint", judge=rubric).labeller_name == "the judge m"


def test_key_covers_the_judge_and_not_how_it_is_asked():
    def key(**changes):
        judge = RubricJudgeSettings(**{"url": "http://host/v1", "model": "m"} | changes)
        return LabelJob(model=D, prompts=D, labeller="endpoint", judge=judge).key()

    assert key() == key(timeout=5, retries=0, parallel=1, key_variable="A", max_unclear=0.5)
    assert len({key(), key(model="n"), key(url="http://other/v1"), key(lowest=0)}) == 4
