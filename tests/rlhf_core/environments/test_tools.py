"""Tool calls in replies, functions as tools, and servers with tools."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from pydantic import ValidationError

from rlhf_core.environments.calls import Call, find_calls
from rlhf_core.environments.make import make_environments
from rlhf_core.errors import ConfigError, TrainingFailure
from rlhf_core.jobs import GRPOJob
from rlhf_core.jobs.environments import (
    CalculatorEnvironment,
    PythonEnvironment,
    ToolsEnvironment,
)
from rlhf_core.judges import posting

HERE = "tests.rlhf_core.environments.test_tools"
ROW = {"prompt": [{"role": "user", "content": "?"}], "answer": "12", "episode": "0-3-7"}


def weather(city: str, days: int = 1) -> dict[str, object]:
    """What the weather will be."""
    if city == "Atlantis":
        raise LookupError("no such city")
    return {"city": city, "days": days}


def slow(seconds: float) -> str:
    """Waits."""
    time.sleep(seconds)
    return "done"


def long(characters: int) -> str:
    """Says much."""
    return "x" * characters


def shown(text: str, word: str | None, number: float, flags: list[bool], also: bool = False) -> str:
    """Shows what it was given."""
    return repr((text, word, number, flags, also))


def odd() -> dict[tuple[int, int], str]:
    """Gives what JSON has no form for."""
    return {(1, 2): "a"}


def untyped(what):
    """Has no types."""


class NoEnvironment:
    """Has no step."""

    def reset(self, row):
        """Begin."""


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def xml(name, **arguments):
    """As Qwen 3 Coder, Qwen 3.5 and Nemotron 3 write a call."""
    given = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in arguments.items())
    return f"<tool_call>\n<function={name}>\n{given}</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("reply", "calls"),
    [
        ("The answer is 4.", []),
        ('{"answer": 4}', []),  # an object may be an answer
        (f"First. {call('f', a=1)}{call('g')}", [Call("f", {"a": 1}), Call("g", {})]),
        (
            '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
            [Call("f", {"a": 1})],
        ),
        ('{"name": "f", "parameters": {"a": [1]}}', [Call("f", {"a": [1]})]),
        ('<|python_tag|>{"name": "f", "parameters": {}}', [Call("f", {})]),
        ('<tool_call>{"name": "f", "arguments": {}}', [Call("f", {})]),  # not closed
        # Reasoning may weigh calls without making them.
        (f"<think>Or {call('f')}?</think>4", []),
        (f"So {call('f')}\n</think>\n\n{call('g')}", [Call("g", {})]),
        (xml("f", a="1", b="x\n y"), [Call("f", {"a": "1", "b": "x\n y"}, texts=True)]),
        (xml("f") + xml("g"), [Call("f", {}, texts=True), Call("g", {}, texts=True)]),
        (
            xml("f", a="1").removesuffix("\n</function>\n</tool_call>"),
            [Call("f", {"a": "1"}, texts=True)],
        ),
        (
            "<|tool_call_start|>[f(a='x', b=[1]), g()]<|tool_call_end|>",
            [Call("f", {"a": "x", "b": [1]}), Call("g", {})],
        ),
        ("<|tool_call_start|>f(a=-1)", [Call("f", {"a": -1})]),
        (xml("f") + " \n" * 100_000, [Call("f", {}, texts=True)]),  # in time
        (xml("f", a=" " * 200_000), [Call("f", {"a": " " * 200_000}, texts=True)]),
    ],
)
def test_calls_are_found(reply, calls):
    assert find_calls(reply) == calls


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ("<tool_call>f(1)</tool_call>", "not JSON"),
        ("<tool_call>[1]</tool_call>", "names no tool"),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "not an object"),
        ('<tool_call>{"name": "f"}</tool_call>', "not an object"),
        ('<|python_tag|>{"name"', "not JSON"),
        ("<tool_call>\n<function=f>\n<parameter=a>\n1\n</function></tool_call>", "not closed"),
        ("<tool_call><function=f\n" + " " * 100_000, "<function=...> of the call is not closed"),
        ("<|tool_call_start|>[f(1)]<|tool_call_end|>", "not of the form [name(key=value)]"),
        ("<|tool_call_start|>[f(a=g())]<|tool_call_end|>", "not of the form [name(key=value)]"),
        ("<|tool_call_start|>[os.f(**{})]", "not of the form [name(key=value)]"),
        ("<tool_call>" + "[" * 100_000, "not JSON"),
    ],
)
def test_calls_that_cannot_be_read_say_why(reply, problem):
    (found,) = find_calls(reply)
    assert problem in found.problem


def begun(settings):
    environment = make_environments(settings).new()
    assert environment.reset(ROW) is None
    return environment


def answers(environment, reply):
    step = environment.step(reply, [])
    assert not step.done
    return [message["content"] for message in step.observation], dict(step.counts)


def test_functions_are_tools_and_their_failures_are_observations():
    settings = ToolsEnvironment(
        functions=(f"{HERE}:weather", f"{HERE}:slow", f"{HERE}:long"), time_limit=0.2, max_result=9
    )
    made = make_environments(settings)
    schema = made.schemas[0]["function"]
    assert schema["description"] == "What the weather will be."
    assert schema["parameters"] == {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 1}},
        "required": ["city"],
    }
    environment = begun(settings.model_copy(update={"max_result": 200}))
    both = call("weather", city="Oslo", days="2") + call("weather", city="Atlantis")
    texts, counts = answers(environment, both)
    assert texts == ['{"city": "Oslo", "days": 2}', "Error: no such city"]
    assert counts == {"tool_calls": 2, "tool_errors": 1}
    wrong = {
        call("weather"): "Error: city: Field required",
        call("weather", city="Oslo", hours=2): "Error: hours: Extra inputs are not permitted",
        call("sing"): "Error: there is no tool 'sing'; the tools are weather, slow, long",
        call("slow", seconds=2.0): "Error: no result within 0.2 s",
        "<tool_call>?</tool_call>": "Error: the call is not JSON",
    }
    for reply, said in wrong.items():
        texts, counts = answers(environment, reply)
        assert texts[0].startswith(said)
        assert counts == {"tool_calls": 1, "tool_errors": 1}
    texts, counts = answers(begun(settings), call("long", characters=12))
    assert texts == ["xxxxxxxxx ... (3 characters more)"]
    assert counts == {"tool_calls": 1, "tool_errors": 0, "tool_results_cut": 1}
    last = environment.step("It will rain.", [])
    assert last.done and last.reward == 0


def test_texts_become_what_a_tool_asks_for():
    """In XML all arguments are texts."""
    environment = begun(ToolsEnvironment(functions=(f"{HERE}:shown",)))
    reply = xml("shown", text="1", word="2", number="3", flags="[true]", also="True")
    assert answers(environment, reply)[0] == ["('1', '2', 3.0, [True], True)"]
    reply = xml("shown", text="1", word="2", number="three", flags="[true]")
    assert answers(environment, reply)[0][0].startswith("Error: number: ")
    assert answers(environment, xml("sing", a="1"))[0][0].startswith("Error: there is no tool")


def test_result_without_a_form_in_json_is_an_observation():
    environment = begun(ToolsEnvironment(functions=(f"{HERE}:odd",)))
    texts, counts = answers(environment, call("odd"))
    assert texts[0].startswith("Error: the result cannot be written as JSON")
    assert counts == {"tool_calls": 1, "tool_errors": 1}


def test_calculator_gives_a_reward_for_the_right_number():
    environment = begun(CalculatorEnvironment())
    assert answers(environment, call("calculator", expression="3*4"))[0] == ["12"]
    assert answers(environment, call("calculator", expression="os"))[1]["tool_errors"] == 1
    assert environment.step("That makes 12 apples.", []).reward == 1.0
    assert environment.step("That makes 13 apples.", []).reward == 0.0
    assert environment.step("I do not know.", []).reward == 0.0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (ToolsEnvironment(functions=(f"{HERE}:nothing",)), "correct its name"),
        (ToolsEnvironment(functions=("no_such_module_9:f",)), "cannot be imported"),
        (ToolsEnvironment(functions=(f"{HERE}:untyped",)), "no type annotation"),
        (ToolsEnvironment(functions=(f"{HERE}:slow", f"{HERE}:slow")), "two tools"),
        (PythonEnvironment(environment=f"{HERE}:NoEnvironment"), "methods reset and step"),
    ],
)
def test_wrong_code_is_named(settings, said):
    with pytest.raises(ConfigError, match=said):
        make_environments(settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"environment": {"type": "tools"}}, "neither functions nor servers"),
        ({"rewards": [{"type": "environment"}]}, "there is no environment"),
        (
            {"environment": {"type": "tools", "functions": ["a:b"]},
             "rewards": [{"type": "environment"}]},
            "tools give no reward",
        ),
        ({"environment": {"type": "calculator", "max_episode_tokens": 64}}, "less than one reply"),
        ({"environment": {"type": "python", "environment": "a.b"}}, "not the path of a class"),
        ({"environment": {"type": "tools", "servers": [{"url": "host:80"}]}}, "not a base URL"),
        (
            {"environment": {"type": "tools", "servers": [
                {"url": "http://host", "key_variable": "sk-1234"}]}},
            "String should match pattern",
        ),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(settings, said):
    with pytest.raises(ValidationError, match=said):
        GRPOJob(model="a" * 64, prompts="b" * 64,
                **({"rewards": [{"type": "repetition"}]} | settings))  # fmt: skip


# ----------------------------------------------------------------------------------- servers


class Tools(BaseHTTPRequestHandler):
    """One tool, twice; fails as often as it is told to."""

    failures, seen, statuses = 0, [], 503

    def do_GET(self):
        self.say(200, [{"name": "twice", "description": "Doubles.", "parameters": {"n": "int"}}])

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        type(self).seen.append((body, self.headers.get("authorization")))
        if type(self).failures:
            type(self).failures -= 1
            self.say(type(self).statuses, {"detail": "busy"})
        elif "n" not in body["arguments"]:
            self.say(400, {"error": "n is missing"})
        else:
            self.say(200, {"result": 2 * body["arguments"]["n"]})

    def say(self, status, value):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        """Say nothing."""


@pytest.fixture
def tool_server(monkeypatch):
    monkeypatch.setattr(posting, "FIRST_BACKOFF", 0.01)
    Tools.failures, Tools.seen, Tools.statuses = 0, [], 503
    server = ThreadingHTTPServer(("127.0.0.1", 0), Tools)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_server_has_tools(tool_server, monkeypatch):
    monkeypatch.setenv("TOOLS_KEY", "sesame")
    # What is on this machine is not asked through a proxy.
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    settings = ToolsEnvironment(servers=({"url": tool_server + "/", "key_variable": "TOOLS_KEY"},))
    environment = begun(settings)
    Tools.failures, Tools.statuses = 2, 521  # it comes back
    texts, counts = answers(environment, call("twice", n=21) + call("twice"))
    assert texts == ["42", "Error: n is missing"]
    assert counts == {"tool_calls": 2, "tool_errors": 1}
    assert {key for _, key in Tools.seen} == {"Bearer sesame"}
    # The same id comes again with every attempt, so that a server can answer it once.
    assert [body["id"] for body, _ in Tools.seen] == ["0-3-7-1-0"] * 3 + ["0-3-7-1-1"]


def test_arguments_that_cannot_be_sent_are_observations(tool_server):
    """A policy may write anything; the stage goes on."""
    environment = begun(ToolsEnvironment(servers=({"url": tool_server},)))
    for reply in (
        '<tool_call>{"name": "twice", "arguments": {"n": NaN}}</tool_call>',
        "<|tool_call_start|>[twice(n={1})]<|tool_call_end|>",
    ):
        texts, counts = answers(environment, reply)
        assert texts[0].startswith("Error: the arguments cannot be written as JSON")
        assert counts == {"tool_calls": 1, "tool_errors": 1} and Tools.seen == []
    half = '<tool_call>{"name": "twice", "arguments": {"n": "\\ud83d"}}</tool_call>'
    texts, counts = answers(environment, half)
    assert counts == {"tool_calls": 1, "tool_errors": 0} and texts == ["\ud83d\ud83d"]


def test_dead_server_ends_the_stage(tool_server):
    settings = ToolsEnvironment(servers=({"url": tool_server, "retries": 2},))
    environment = begun(settings)
    Tools.failures = 99
    with pytest.raises(TrainingFailure, match=r"failed 3 times: HTTP 503.*goes on from"):
        environment.step(call("twice", n=1), [])
    assert len(Tools.seen) == 3
    Tools.statuses = 403
    with pytest.raises(TrainingFailure, match=r"refused a request without a token \(HTTP 403\)"):
        environment.step(call("twice", n=1), [])
    away = ToolsEnvironment(servers=({"url": "http://127.0.0.1:9", "retries": 0},))
    with pytest.raises(TrainingFailure, match="failed 1 time: ConnectError"):
        make_environments(away)


def test_token_must_be_set(tool_server, monkeypatch):
    monkeypatch.delenv("TOOLS_KEY", raising=False)
    settings = ToolsEnvironment(servers=({"url": tool_server, "key_variable": "TOOLS_KEY"},))
    with pytest.raises(ConfigError, match="TOOLS_KEY, which is not set"):
        make_environments(settings)
