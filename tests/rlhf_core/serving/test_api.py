"""The server for transformers under many clients: errors, streams, leaving, and equal replies."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.rlhf_core.serving.live import HELLO, serving

pytestmark = pytest.mark.slow
pytest.importorskip("openai")


@pytest.fixture(scope="module")
def server():
    with serving() as found:
        yield found


def post(server, body, path="/v1/chat/completions"):
    return httpx.post(f"{server.url}{path}", json=body, timeout=60)


def test_replies_to_many_clients_are_those_to_one(server, monkeypatch):
    import torch

    from rlhf_core.serving.batch import Batch

    step, rows = Batch.step, []
    monkeypatch.setattr(
        Batch, "step", lambda self, tokens: (rows.append(len(tokens)), step(self, tokens))[1]
    )
    model, tokenizer = server.chat_model.model, server.chat_model.tokenizer
    prompts = [[(7 * i + j) % 300 + 5 for j in range(3 + 5 * i % 40)] for i in range(12)]
    alone = []
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=3 + 4 * i, do_sample=False
        )[0, len(prompt) :]
        alone.append(tokenizer.decode(output, skip_special_tokens=True))

    def ask(i):
        time.sleep(0.005 * (i % 3))
        found = server.client.completions.create(
            model="tiny", prompt=prompts[i], max_tokens=3 + 4 * i, temperature=0
        )
        return found.choices[0].text

    with ThreadPoolExecutor(12) as threads:
        assert list(threads.map(ask, range(12))) == alone
    assert max(rows) > 3  # of them at a time
    several = server.client.completions.create(
        model="tiny", prompt=prompts[:3], max_tokens=3, temperature=0
    )
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert several.choices[0].text == alone[0]


@pytest.mark.parametrize(
    ("body", "param", "text"),
    [
        ({"messages": HELLO, "max_tokens": 18_011}, None, "context is 1024 tokens. The prompt has"),
        ({"messages": [{"role": "user", "content": "cat " * 18_011}]}, None, "leaves none to a"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role", "'system'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "image_url": {"url": "x"}}]}]},
         "messages[0].content[0].image_url", "not supported"),
        ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"id": "x"}]}]},
         "messages[0].tool_calls", "not supported"),
        ({"messages": [{"role": "user", "content": "a<eos>b"}]}, "messages[0].content", "special"),
        ({"messages": HELLO, "temperature": "0.5"}, "temperature", "valid number (found '0.5')"),
        ({"messages": HELLO, "max_tokens": True}, "max_tokens", "valid integer"),
        ({"messages": HELLO, "temprature": 0.5}, "temprature", "not supported here"),
        ({}, "messages", "is missing"),
    ],
)  # fmt: skip
def test_wrong_values_are_told_in_openais_form(server, body, param, text):
    eos = server.chat_model.tokenizer.eos_token
    answer = post(server, json.loads(json.dumps(body).replace("<eos>", eos)))
    error = answer.json()["error"]
    assert answer.status_code == 400 and set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param and text in error["message"] and len(error["message"]) < 300


@pytest.mark.parametrize(
    ("prompt", "text"),
    [([], "at least 1 item"), (5.5, "token ids"), (["a", 3], "token ids"), ([[]], "token ids"),
     ([10**9], "has token 1000000000"), ([True], "token ids"), (["a"] * 600, "more than 1024")],
)  # fmt: skip
def test_wrong_prompts_are_told(server, prompt, text):
    answer = post(server, {"prompt": prompt, "n": 2}, "/v1/completions")
    assert answer.status_code == 400 and text in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] in ("prompt", "n")


def test_other_errors_have_openais_form_too(server):
    url = f"{server.url}/v1/chat/completions"
    kind = {"Content-Type": "application/json"}
    for body in (b"{", b"[1]", b'{"messages": [{"role": "user", "content": "\xff"}]}', b""):
        answer = httpx.post(url, content=body, headers=kind)
        assert answer.status_code == 400 and answer.json()["error"]["message"]
    answer = httpx.get(url)
    assert answer.status_code == 405 and answer.json()["error"]["message"] == "Method Not Allowed"
    assert httpx.get(f"{server.url}/v1/models/tiny").json()["id"] == "tiny"
    assert httpx.get(f"{server.url}/v1/models/other").status_code == 404
    assert server.client.models.list().data[0] == server.client.models.retrieve("tiny")


@pytest.mark.parametrize(
    ("path", "given"), [("chat/", {"messages": HELLO}), ("", {"prompt": "Hi"})]
)
def test_streams_end_with_done_and_have_usage_only_when_asked(server, path, given):
    body = {**given, "stream": True, "max_tokens": 3, "temperature": 0}
    lines = post(server, body, f"/v1/{path}completions").text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]" and "usage" not in "".join(lines)
    body["stream_options"] = {"include_usage": True}
    *_, usage, done = post(server, body, f"/v1/{path}completions").text.strip().split("\n\n")
    assert done == "data: [DONE]" and '"completion_tokens": 3' in usage


def test_neutral_values_of_parameters_that_are_not_used_are_accepted(server):
    unused = {"tools": [], "functions": None, "store": False, "audio": None, "logit_bias": {},
              "response_format": {"type": "text"}, "tool_choice": "none", "stop": None}  # fmt: skip
    echoed = {"role": "assistant", "content": "Hi", "refusal": None, "tool_calls": None}
    messages = [*HELLO, echoed, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert post(server, {"messages": messages, "max_tokens": 2, **unused}).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_leaves_ends_its_reply(server, stream, monkeypatch):
    from rlhf_core.serving.batch import Batch

    step, generator = Batch.step, server.generator
    monkeypatch.setattr(Batch, "step", lambda *given: (time.sleep(0.01), step(*given))[1])
    body = {"messages": HELLO, "max_tokens": 1000, "stream": stream, "logit_bias": {"77": 100}}
    target = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    text = json.dumps(body)
    with socket.create_connection(target) as client:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json"
        client.sendall(f"{head}\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())
        assert within_seconds(20, lambda: generator._rows)
        row = generator._rows[0]
    assert within_seconds(20, lambda: not generator._rows)
    assert len(row.ids) < 1000


def within_seconds(seconds, condition):
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.005)
    return found


@pytest.mark.parametrize(("error", "status"), [(MemoryError(), 503), (KeyError(), 500)])
def test_failure_is_told_and_the_next_request_is_answered(server, monkeypatch, error, status):
    def step(self, tokens):
        raise error

    monkeypatch.setattr("rlhf_core.serving.batch.Batch.step", step)
    answer = post(server, {"messages": HELLO, "max_tokens": 5})
    assert answer.status_code == status and answer.json()["error"]["type"] == "server_error"
    stream = post(server, {"messages": HELLO, "max_tokens": 5, "stream": True}).text
    assert '"server_error"' in stream and stream.endswith("data: [DONE]\n\n")
    monkeypatch.undo()
    assert post(server, {"messages": HELLO, "max_tokens": 5}).status_code == 200


@pytest.mark.parametrize("reason", ["rows cannot join", "no memory for two"])
def test_replies_that_there_is_no_room_for_wait(server, reason, monkeypatch):
    from rlhf_core.serving.batch import Batch

    body = {"messages": HELLO, "max_tokens": 5, "temperature": 0}
    wanted = post(server, body).json()["choices"]
    generator, step, rows = server.generator, Batch.step, []
    monkeypatch.setattr(
        Batch, "step", lambda self, tokens: (rows.append(len(tokens)), step(self, tokens))[1]
    )
    if reason == "rows cannot join":
        monkeypatch.setattr(generator, "_batch", Batch(generator._batch.lm, joins=False))
        monkeypatch.setattr(generator, "_max_rows", 1)
    else:
        monkeypatch.setattr(generator, "_memory", 1)
    with ThreadPoolExecutor(3) as threads:
        answers = list(threads.map(lambda _: post(server, body).json()["choices"], range(3)))
    assert answers == [wanted] * 3
    assert set(rows) == {1}
