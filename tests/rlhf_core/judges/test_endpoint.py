"""The judge over HTTP, against a real local server that speaks chat completions."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pydantic import ValidationError

import rlhf_core.judges.posting as module
from rlhf_core.errors import ConfigError, JudgeError
from rlhf_core.jobs.judging import EndpointJudgeSettings
from rlhf_core.judges.endpoint import EndpointJudge
from rlhf_core.judges.posting import retry_after
from tests.rlhf_core.rewards.standin import StandIn

KEY = "marked-0123456789"
TEMPLATE = "[[A]] or [[B]]?\nP:{prompt}\nA:{first}\nB:{second}"
Answer = str | tuple[int, Any] | tuple[int, Any, dict[str, str]]


class Endpoint(StandIn):
    """Speaks chat completions; a test sets `judge`."""

    def __init__(self) -> None:
        super().__init__(self.complete)
        self.url += "/v1"
        self.judge: Callable[[str, str, str], Answer] = lambda prompt, first, second: "[[C]]"

    def complete(self, path: str, body: dict[str, Any]) -> Any:
        _, prompt, first, second = body["messages"][0]["content"].split("\n")
        answer = self.judge(prompt[2:], first[2:], second[2:])
        if isinstance(answer, str):
            return {"choices": [{"message": {"role": "assistant", "content": answer}}]}
        code, value, *more = answer
        return code, value, more[0] if more else {}


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_BACKOFF", 0.01)
    monkeypatch.setenv("JUDGE_KEY", KEY)


def judge(endpoint: Endpoint, **changes: Any) -> EndpointJudge:
    settings: dict[str, Any] = {
        "url": endpoint.url, "model": "referee", "template": TEMPLATE, "retries": 2, "timeout": 5,
        "key_variable": "JUDGE_KEY",
    }  # fmt: skip
    return EndpointJudge(EndpointJudgeSettings(**{**settings, **changes}))


def longer(prompt: str, first: str, second: str) -> str:
    """Fair: whichever stands where, the longer reply wins."""
    if len(first) == len(second):
        return "Equal. [[C]]"
    return "I compared [[A]] with [[B]]; better is [[" + "AB"[len(second) > len(first)] + "]]."


def test_better_reply_wins_wherever_it_stands(endpoint: Endpoint) -> None:
    endpoint.judge = longer
    asked = judge(endpoint)
    left, right = ["long one", "x", "same", "abc"], ["short", "longer", "same", "xyz"]
    assert asked.compare(["p", "q", "r", "s"], left, right) == [1.0, 0.0, 0.5, 0.5]
    assert asked.counts == {
        "pairs": 4, "left": 1, "right": 1, "agreed": 1, "by_position": 0, "half": 0,
        "identical": 1, "unclear": 0,
    }  # fmt: skip
    assert len(endpoint.requests) == 6  # none for the identical pair
    path, headers, body = endpoint.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert body["model"] == "referee" and body["temperature"] == 0.0 and body["max_tokens"] == 512
    pairs = sorted(b["messages"][0]["content"].split("\n", 1)[1] for _, _, b in endpoint.requests)
    assert pairs[:2] == ["P:p\nA:long one\nB:short", "P:p\nA:short\nB:long one"]


@pytest.mark.parametrize("letter", ["A", "B"])
def test_judge_that_goes_by_position_finds_only_ties(endpoint: Endpoint, letter: str) -> None:
    endpoint.judge = lambda prompt, first, second: f"[[{letter}]]"
    asked = judge(endpoint)
    assert asked.compare(["p"] * 5, list("abcde"), list("vwxyz")) == [0.5] * 5
    assert asked.counts["by_position"] == 5
    assert asked.counts["left"] == asked.counts["right"] == 0


def test_one_undecided_order_is_a_tie(endpoint: Endpoint) -> None:
    endpoint.judge = lambda prompt, first, second: "[[A]]" if first == "a" else "[[C]]"
    asked = judge(endpoint)
    assert asked.compare(["p"], ["a"], ["b"]) == [0.5] and asked.counts["half"] == 1


def test_reply_that_looks_like_a_place_of_the_template_stays(endpoint: Endpoint) -> None:
    judge(endpoint).compare(["{first}"], ["{second}"], ["x"])
    texts = [body["messages"][0]["content"] for _, _, body in endpoint.requests]
    assert "[[A]] or [[B]]?\nP:{first}\nA:{second}\nB:x" in texts


def test_busy_endpoint_is_asked_again_after_the_pause_it_wants(endpoint: Endpoint) -> None:
    refused: list[float] = []

    def busy(prompt: str, first: str, second: str) -> Answer:
        if len(refused) < 2:
            refused.append(time.monotonic())
            return 429, {"error": {"message": "slow down"}}, {"Retry-After": "0.5"}
        return longer(prompt, first, second)

    endpoint.judge = busy
    began = time.monotonic()
    assert judge(endpoint, parallel=1).compare(["p"], ["long"], ["s"]) == [1.0]
    assert len(endpoint.requests) == 4 and time.monotonic() - began >= 1.0


@pytest.mark.parametrize(
    "failure",
    [(503, "down"), (200, "<html>"), (200, {"choices": []}),
     (200, {"choices": [{"message": {"content": 3}}]})],
)  # fmt: skip
def test_failure_that_stays_is_an_error_after_all_tries(
    endpoint: Endpoint, failure: tuple[int, Any]
) -> None:
    endpoint.judge = lambda prompt, first, second: failure
    with pytest.raises(JudgeError, match="failed 3 times: ") as error:
        judge(endpoint, parallel=1).compare(["p"], ["a"], ["b"])
    assert ("HTTP 503: down" if failure[0] == 503 else "the answer") in str(error.value)
    assert len(endpoint.requests) == 3 and error.value.category == "judge"


def test_failure_that_passes_is_none(endpoint: Endpoint) -> None:
    def once(prompt: str, first: str, second: str) -> Answer:
        return (502, "gone for a moment") if len(endpoint.requests) == 1 else "[[B]]"

    endpoint.judge = once
    assert judge(endpoint, parallel=1).compare(["p"], ["a"], ["b"]) == [0.5]


def test_endpoint_that_does_not_answer_is_left_after_its_time(endpoint: Endpoint) -> None:
    gate = threading.Event()
    endpoint.judge = lambda prompt, first, second: "[[A]]" if gate.wait(20) else "[[B]]"
    began = time.monotonic()
    with pytest.raises(JudgeError, match=r"failed 2 times: no answer within 0\.3 s"):
        judge(endpoint, timeout=0.3, retries=1).compare(["p"], ["a"], ["b"])
    gate.set()
    assert time.monotonic() - began < 10


def test_endpoint_that_is_not_there_is_named(endpoint: Endpoint) -> None:
    gone = judge(endpoint, url="http://127.0.0.1:9/v1", retries=0)
    with pytest.raises(JudgeError, match=r"The judge at http://127\.0\.0\.1:9/v1 failed 1 times"):
        gone.compare(["p"], ["a"], ["b"])


def test_refused_key_ends_at_once_and_is_not_shown(endpoint: Endpoint) -> None:
    def refuse(prompt: str, first: str, second: str) -> Answer:
        return 401, {"error": {"message": f"Incorrect API key provided: {KEY}"}}

    endpoint.judge = refuse
    with pytest.raises(JudgeError) as error:
        judge(endpoint, parallel=2).compare(["p"] * 50, ["a"] * 50, ["b"] * 50)
    text = str(error.value)
    assert "rejected the key in $JUDGE_KEY (HTTP 401: Incorrect API key provided: ***)" in text
    assert KEY not in text and len(endpoint.requests) <= 4


def test_key_of_any_variable_is_hidden(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFEREE", "short")  # no name or length by which others know a secret
    endpoint.judge = lambda prompt, first, second: (400, "you sent short")
    with pytest.raises(JudgeError, match=r"HTTP 400: you sent \*\*\*"):
        judge(endpoint, key_variable="REFEREE").compare(["p"], ["a"], ["b"])


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ((404, {"error": {"message": "no such model"}}), "has no model 'referee'"),
        ((400, {"detail": "bad"}), "check the judge's model"),
        ((301, "", {"Location": "https://else.where/v1"}), "redirects to https://else.where/v1"),
    ],
)
def test_what_another_try_would_not_change_is_not_tried_again(
    endpoint: Endpoint, answer: Answer, text: str
) -> None:
    endpoint.judge = lambda prompt, first, second: answer
    with pytest.raises(JudgeError, match=text):
        judge(endpoint, parallel=1).compare(["p"], ["a"], ["b"])
    assert len(endpoint.requests) == 1


def test_first_failure_is_told_and_not_the_ones_that_follow(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(prompt: str, first: str, second: str) -> Answer:
        return (503, "busy") if prompt == "0" else (401, "who are you")

    endpoint.judge = answer
    monkeypatch.setattr(module, "FIRST_BACKOFF", 20.0)  # the first pair would wait so long
    began = time.monotonic()
    with pytest.raises(JudgeError, match="who are you"):
        judge(endpoint).compare(["0", "1"], ["a", "a"], ["b", "b"])
    assert time.monotonic() - began < 10


def test_few_answers_without_a_verdict_are_ties_and_many_an_error(endpoint: Endpoint) -> None:
    def answer(prompt: str, first: str, second: str) -> str:
        return "Hard to say." if prompt == "0" and first == "a" else longer(prompt, first, second)

    endpoint.judge = answer
    prompts, left, right = list("0123456789"), ["a"] * 10, ["bb"] * 10
    asked = judge(endpoint)  # one of 20 is 5 %
    assert asked.compare(prompts, left, right) == [0.5, *[0.0] * 9]
    assert asked.counts["unclear"] == 1 and asked.counts["half"] == 1
    assert len(endpoint.requests) == 22  # asked again twice
    with pytest.raises(JudgeError, match=r"1 of 20 answers of referee .* the limit is 4%"):
        judge(endpoint, max_unclear=0.04).compare(prompts, left, right)


def test_requests_at_once_are_bounded(endpoint: Endpoint) -> None:
    def slow(prompt: str, first: str, second: str) -> str:
        time.sleep(0.05)
        return "[[A]]"

    endpoint.judge = slow
    judge(endpoint, parallel=3).compare(["p"] * 12, ["a"] * 12, ["b"] * 12)
    assert endpoint.most_at_once == 3


@pytest.mark.parametrize(
    ("text", "score"), [("A", 0.5), ("**B**", 0.5), (" [[ A ]] ", 0.5), ("Reply A.", 0.5)]
)
def test_short_answers_are_read(endpoint: Endpoint, text: str, score: float) -> None:
    endpoint.judge = lambda prompt, first, second: text
    asked = judge(endpoint)
    assert asked.compare(["p"], ["a"], ["b"]) == [score] and asked.counts["by_position"] == 1


def test_missing_key_says_where_it_belongs(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ConfigError, match="environment variable JUDGE_KEY, which is not set"):
        judge(endpoint)
    monkeypatch.setenv("JUDGE_KEY", "two words")
    with pytest.raises(ConfigError, match="is not a key") as error:
        judge(endpoint)
    assert "two words" not in str(error.value)
    judge(endpoint, key_variable=None).compare(["p"], ["a"], ["b"])
    assert "Authorization" not in endpoint.requests[0][1]


def test_limits_have_the_names_that_the_endpoint_knows(endpoint: Endpoint) -> None:
    changes = {"limit_name": "max_completion_tokens", "temperature": None, "max_new_tokens": 9}
    judge(endpoint, **changes).compare(["p"], ["a"], ["b"])
    body = endpoint.requests[0][2]
    assert body["max_completion_tokens"] == 9
    assert "max_tokens" not in body and "temperature" not in body


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"key_variable": "sk-0123456789"}, "should match pattern"),  # a key instead of a name
        ({"url": "localhost:8000"}, "not a base URL"),
        ({"url": "https://me:pass@host/v1"}, "key_variable"),
        ({"url": "http://host:99999999/v1"}, "[Pp]ort"),
        ({"template": "{prompt} {first} [[A]] [[B]]"}, r"lacks \{second\}"),
        ({"template": "{prompt} {first} {second}"}, r"does not ask for \[\[A\]\]"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        EndpointJudgeSettings(**{"url": "http://host/v1", "model": "m", **changes})


def test_whole_address_is_as_good_as_the_base() -> None:
    settings = EndpointJudgeSettings(url="http://host/v1/chat/completions", model="m")
    assert settings.url == "http://host/v1"
    assert all(part in settings.template for part in ("{prompt}", "[[A]]", "[[B]]", "[[C]]"))


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [("3", 3, 3), ("1e9", 60, 60), ("-5", 0, 0), ("soon", 0, 0), ("nan", 0, 0),
     ("Wed, 21 Oct 2099 07:28:00 GMT", 60, 60), ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0)],
)  # fmt: skip
def test_pause_that_an_endpoint_asks_for_is_bounded(value: str, low: float, high: float) -> None:
    import httpx

    assert low <= retry_after(httpx.Response(429, headers={"Retry-After": value})) <= high
