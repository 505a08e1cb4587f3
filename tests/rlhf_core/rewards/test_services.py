"""Rewards of services, against stand-ins that answer over real HTTP."""

from __future__ import annotations

import threading
import time

import pytest
from pydantic import ValidationError

from rlhf_core.errors import ConfigError, DataError, JudgeError
from rlhf_core.jobs.reward_services import CodeReward, HttpReward, JudgeReward
from rlhf_core.judges import posting
from rlhf_core.rewards.services import Answer, Item, Services
from rlhf_core.rewards.services.code import code_in
from rlhf_core.rewards.services.code import tests_of as read_tests
from tests.rlhf_core.rewards.standin import StandIn

KEY = "marked-0123456789"
USER = [{"role": "user", "content": "How many legs?"}]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(posting, "FIRST_BACKOFF", 0.01)
    monkeypatch.setenv("SERVICE_KEY", KEY)


@pytest.fixture
def start():
    """answer(path, body) -> a stand-in; all are closed at the end."""
    made = []

    def started(answer):
        made.append(StandIn(answer))
        return made[-1]

    yield started
    for one in made:
        one.close()


@pytest.fixture
def services():
    """rewards, **options -> Services; all are closed at the end."""
    made = []

    def of(*rewards, **options):
        made.append(Services(rewards, **options))
        return made[-1]

    yield of
    for one in made:
        one.close()


def lengths(path, body):
    """Scores a reply by its length, with a component."""
    replies = [item["reply"] for item in body["items"]]
    return {"scores": [len(r) for r in replies], "components": {"vowels": [
        sum(c in "aeiou" for c in r) for r in replies]}}  # fmt: skip


def items(*replies, **row):
    return [Item(USER, reply, True, {"row": i, **row}) for i, reply in enumerate(replies)]


def test_http_reward_speaks_the_protocol(start, services):
    server = start(lengths)
    reward = HttpReward(url=server.url + "/score", key_variable="SERVICE_KEY", weight=2.0)
    asked = services(reward)
    assert asked.names == ["http"] and asked.weights == [2.0]
    (found,) = asked.answers(items("bee", "", answer="6", prompt_ids=[1]))
    assert found == [Answer(3.0, {"vowels": 2.0}), Answer(0.0, {"vowels": 0.0})]
    path, headers, _ = server.requests[0]
    assert path == "/score" and headers["Authorization"] == f"Bearer {KEY}"
    sent = [item for _, _, body in server.requests for item in body["items"]]
    assert sorted(sent, key=lambda item: item["reply"])[1] == {
        "prompt": USER, "reply": "bee", "finished": True, "row": {"answer": "6"}
    }  # fmt: skip


def test_what_waits_goes_together_and_equal_questions_are_asked_once(start, services):
    gate, seen = threading.Event(), threading.Event()

    def answer(path, body):
        seen.set()
        gate.wait(20)
        return lengths(path, body)

    server = start(answer)
    asked = services(HttpReward(url=server.url, batch_size=4, parallel=1))
    began = time.monotonic()
    asked.begin(items("x"))
    assert seen.wait(10)  # the first reply is sent alone, nothing waits for it
    asked.begin(items("aa", "b", "aa", "cccc", "ddd"))
    assert time.monotonic() - began < 10
    assert asked.asked(items("b", "new", "x")) == [0, 2]
    gate.set()
    (found,) = asked.answers(items("aa", "x", "b", "aa", "ddd", "cccc"))
    assert [a.score for a in found] == [2, 1, 1, 2, 3, 4]
    assert [len(body["items"]) for _, _, body in server.requests] == [1, 4]


def test_requests_at_once_are_bounded_and_ranks_share_them(start, services):
    def slow(path, body):
        time.sleep(0.05)
        return lengths(path, body)

    server = start(slow)
    reward = HttpReward(url=server.url, batch_size=1, parallel=6)
    for options, most in (({"rank": 1}, 3), ({"rank": 0, "first_asks": True}, 6)):
        server.most_at_once = 0
        services(reward, ranks=2, **options).answers(items(*"abcdefghijkl"))
        assert server.most_at_once == most
    assert len(server.requests) == 24


def test_resumed_stage_does_not_ask_again(start, services, tmp_path):
    server = start(lengths)
    reward = HttpReward(url=server.url)
    first = services(reward, folder=tmp_path)
    want = first.answers(items("one", "three"))
    first.close()
    (path,) = tmp_path.glob("http/answers-0.jsonl")
    assert "three" not in path.read_text()
    with path.open("a") as file:
        file.write('{"key": "cut')  # killed in the middle of a line
    before = len(server.requests)
    again = services(reward.model_copy(update={"timeout": 5.0}), folder=tmp_path, rank=1, ranks=2)
    assert again.answers(items("one", "three")) == want and len(server.requests) == before
    again.answers(items("seven"))
    assert services(reward, folder=tmp_path).asked(items("seven", "one", "two")) == [0, 1]
    other = services(reward.model_copy(update={"version": "2"}), folder=tmp_path)
    assert other.asked(items("one")) == []


def test_failure_that_passes_is_none(start, services):
    tries = []

    def answer(path, body):
        tries.append(1)
        return (503, "busy", {"Retry-After": "0"}) if len(tries) < 3 else lengths(path, body)

    asked = services(HttpReward(url=start(answer).url, retries=2))
    assert asked.answers(items("ab"))[0][0].score == 2.0


def test_service_of_this_machine_is_not_asked_by_a_proxy(start, services, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nothing listens
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    server = start(lengths)
    for url in (server.url, server.url.replace("127.0.0.1", "localhost")):
        (found,) = services(HttpReward(url=url, retries=0)).answers(items("ab"))
        assert found[0].score == 2.0
    with pytest.raises(JudgeError, match="ConnectError"):
        services(HttpReward(url="http://service.invalid/", retries=0)).answers(items("ab"))


@pytest.mark.parametrize("status", [408, 429, 500, 502, 520, 524, 529])
def test_every_failure_of_the_server_is_tried_again(start, services, status):
    tries = []

    def answer(path, body):
        tries.append(1)
        return (status, "busy", {}) if len(tries) == 1 else lengths(path, body)

    asked = services(HttpReward(url=start(answer).url, retries=1))
    assert asked.answers(items("ab"))[0][0].score == 2.0


def test_answer_that_trickles_has_the_time_limit_of_a_request(start, services):
    def trickle():
        for _ in range(100):  # 5 s, each wait far below the limit
            time.sleep(0.05)
            yield b" "

    asked = services(
        HttpReward(url=start(lambda path, body: trickle()).url, retries=0, timeout=0.4)
    )
    began = time.monotonic()
    with pytest.raises(JudgeError, match=r"failed 1 times: no answer within 0\.4 s"):
        asked.answers(items("a"))
    assert time.monotonic() - began < 2.5


@pytest.mark.parametrize(
    ("answer", "text", "requests"),
    [
        ((503, "down", {}), "failed 3 times: HTTP 503: down", 3),
        ("<html>", "the answer is not JSON", 3),
        ({"score": 1}, 'has no "scores"', 3),
        ({"scores": [1.0, 2.0]}, "has 2 values for 1 items", 3),
        ({"scores": ["high"]}, "'high' for item 0", 3),
        ({"scores": [True]}, "'True' for item 0", 3),
        ('{"scores": [NaN]}', "'nan' for item 0", 3),
        ({"scores": [1], "components": {"a b": [1]}}, "components", 3),
        ((401, {"error": f"bad {KEY}"}, {}), r"rejected the key in \$SERVICE_KEY .*bad \*\*\*", 1),
        ((400, "no", {}), "rejected the request", 1),
        ((307, "", {"Location": "http://else/where"}), "redirects to http://else/where", 1),
    ],
)
def test_failures_end_the_stage_with_what_was_found(start, services, answer, text, requests):
    server = start(lambda path, body: answer)
    asked = services(HttpReward(url=server.url, retries=2, key_variable="SERVICE_KEY"))
    with pytest.raises(JudgeError, match=text) as error:
        asked.answers(items("a"))
    assert KEY not in str(error.value) and len(server.requests) == requests


def test_first_failure_ends_all_others(start, services):
    server = start(lambda path, body: (403, "who are you", {}))
    asked = services(HttpReward(url=server.url, batch_size=1, parallel=2))
    with pytest.raises(JudgeError, match="who are you"):
        asked.answers(items(*map(str, range(50))))
    assert len(server.requests) <= 4


def test_missing_key_is_told_before_anything_is_sent(monkeypatch):
    monkeypatch.delenv("SERVICE_KEY")
    with pytest.raises(ConfigError, match="environment variable SERVICE_KEY, which is not set"):
        Services([HttpReward(url="http://host/score", key_variable="SERVICE_KEY")])


# ------------------------------------------------------------------------------------------ judge


def rating(of):
    """A chat completion whose text is a function of the question's."""

    def answer(path, body):
        assert path == "/v1/chat/completions"
        text = of(body["messages"][0]["content"])
        return {"choices": [{"message": {"content": text}}], "usage": {"total_tokens": 11}}

    return answer


def judge(server, **changes):
    settings = {"url": server.url + "/v1", "model": "referee", "retries": 1,
                "template": "{prompt}|{reply} [[5]]"}  # fmt: skip
    return JudgeReward(**{**settings, **changes})


def test_judge_rates_each_reply_from_0_to_1(start, services):
    words = {
        "one": "[[1]]",
        "ten": "I thought [[3]]. It is [[ 10 ]].",
        "bare": "4",
        "of": "[[7/10]]",
    }
    server = start(rating(lambda question: words[question.split("|")[1].split()[0]]))
    (found,) = services(judge(server)).answers(items(*words))
    assert [a.score for a in found] == pytest.approx([0, 1, 1 / 3, 2 / 3])
    assert all(a.components == {"tokens": 11.0} and not a.failure for a in found)
    assert server.requests[0][2]["model"] == "referee"
    assert server.requests[0][2]["messages"][0]["content"].startswith("How many legs?|")


def test_answers_without_a_rating_score_0_and_are_counted_and_bounded(start, services):
    def words(question):
        return "Hard to say." if "odd" in question else "[[11]]" if "off" in question else "[[10]]"

    server = start(rating(words))
    asked = services(judge(server))
    answers = asked.answers(items("odd", "even"))
    asked.check(answers)  # one is always allowed
    assert [(a.score, a.failure) for a in answers[0]] == [(0.0, "judge_unclear"), (1.0, "")]
    assert [a.components["tokens"] for a in answers[0]] == [22.0, 11.0], "they cost all the same"
    assert len(server.requests) == 3  # asked again once
    with pytest.raises(JudgeError, match=r"2 of 3 answers of referee .* no rating from 1 to 10"):
        asked.check(asked.answers(items("odd", "even", "off")))


def test_rubric_may_hold_the_rows_answer(start, services):
    server = start(rating(lambda question: "[[10]]" if question.startswith("6|6") else "[[1]]"))
    asked = services(judge(server, template="{answer}|{reply}{prompt} [[5]]"))
    (found,) = asked.answers(items("6", "7", answer="6"))
    assert [a.score for a in found] == [1.0, 0.0]
    with pytest.raises(DataError, match="row 0 has no answer"):
        asked.answers(items("6"))


# ------------------------------------------------------------------------------------------- code


def sandbox(path, body):
    """SandboxFusion as far as it is asked here, without running anything."""
    assert path == "/run_code" and body["language"] == "python" and body["run_timeout"] == 10.0
    status = "Failed" if "assert f() == 2" in body["code"] else "Success"
    last = body["code"].splitlines()[-1].removeprefix("print('").removesuffix("')")
    stdout = "" if "exit()" in body["code"] else f"hello\n{last}\n"
    result = {"status": "Finished", "stdout": stdout}
    return {"status": status, "message": "", "run_result": result}


def test_code_is_sent_to_the_sandbox_with_each_test(start, services):
    server = start(sandbox)
    asked = services(CodeReward(url=server.url))
    reply = "I say:\n```python\ndef f():\n    return 1\n```\nDone."
    tests = '["assert f() == 1", "assert f() == 2"]'
    replies = reply, "no code", "```\nexit()\n```"
    (found,) = asked.answers(items(*replies, answer=tests))
    assert [a.score for a in found] == [0.5, 0.0, 0.0], "who leaves early has not passed"
    assert [a.failure for a in found] == ["", "code_missing", ""]
    codes = sorted(body["code"] for _, _, body in server.requests)
    assert len(codes) == 4
    assert codes[0].startswith("def f():\n    return 1\n\nassert f() == 1\nprint()\nprint('passed ")
    with pytest.raises(DataError, match="needs tests in column 'answer'"):
        asked.answers(items(reply))


def test_sandbox_that_fails_itself_is_asked_again_and_then_an_error(start, services):
    server = start(lambda path, body: {"status": "SandboxError", "message": "no disk"})
    with pytest.raises(JudgeError, match=r"failed 2 times: the sandbox failed .*no disk"):
        services(CodeReward(url=server.url, retries=1)).answers(items("```\nx\n```", answer="x"))


@pytest.mark.parametrize(
    ("reply", "code"),
    [("```py\na\n```\n```python\nb\n```", "b"), ("```\nopen", "open"), ("`a`", ""), ("", "")],
)
def test_last_block_is_the_code(reply, code):
    assert code_in(reply) == code


@pytest.mark.parametrize(
    ("value", "tests"), [("assert f()", ["assert f()"]), ('["a", ""]', ["a"]), ("", []), (None, []),
                         ("[1]", ["[1]"])]
)  # fmt: skip
def test_tests_are_one_program_or_a_list(value, tests):
    assert read_tests(value) == tests


# --------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("reward", "changes", "text"),
    [
        (HttpReward, {"url": "host/score"}, "not a base URL"),
        (HttpReward, {"url": "http://me:secret@host"}, "key_variable"),
        (HttpReward, {"key_variable": "sk-0123456789"}, "should match pattern"),
        (JudgeReward, {"template": "{prompt} [[5]]"}, r"lacks \{reply\}"),
        (JudgeReward, {"template": "{prompt} {reply}"}, "does not ask for a rating"),
        (JudgeReward, {"lowest": 5, "highest": 5}, "highest is 5 and lowest 5"),
        (CodeReward, {"run_timeout": 60}, "run_timeout is 60 s and timeout 60 s"),
    ],
)
def test_wrong_settings_are_refused(reward, changes, text):
    settings = {"url": "http://host"} | ({"model": "m"} if reward is JudgeReward else {})
    with pytest.raises(ValidationError, match=text):
        reward(**{**settings, **changes})
