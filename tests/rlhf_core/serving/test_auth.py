"""What stands before the server, without a model."""

from __future__ import annotations

import asyncio
import json

import pytest

from rlhf_core.serving.auth import MAX_BODY_BYTES, AuthMiddleware
from tests.rlhf_core.data.helpers import byte_tokenizer

JSON = b"application/json; charset=utf-8"
END = "<|im_end|>"
CHAT = "/v1/chat/completions"


def ask(auth, path, body=None, key=None, kind=JSON):
    """Status and JSON of one request."""
    data = b"" if body is None else json.dumps(body).encode()
    headers = [(b"content-length", str(len(data)).encode())]
    headers += [(b"content-type", kind)] if kind else []
    headers += [(b"authorization", f"Bearer {key}".encode())] if key else []
    scope = {"type": "http", "path": path, "headers": headers,
             "method": "GET" if body is None else "POST"}  # fmt: skip
    sent = []

    async def receive():
        return {"type": "http.request", "body": data, "more_body": False}

    async def send(message):
        sent.append(message)

    asyncio.run(auth(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"])


async def echo(scope, receive, send):
    body = (await receive())["body"] if scope["method"] == "POST" else b"{}"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


@pytest.mark.parametrize("path", ["/load_model", "/reset", "/docs", "/v1/audio/transcriptions"])
def test_paths_that_load_or_drop_models_are_closed(path):
    status, answer = ask(AuthMiddleware(echo, "bot", None), path, {})
    assert status == 404 and path in answer["error"]["message"]


def test_key_is_asked_for():
    auth = AuthMiddleware(echo, "bot", "right-key")
    assert ask(auth, "/v1/models")[0] == 401
    assert ask(auth, "/v1/models", key="wrong-key")[0] == 401
    assert ask(auth, "/v1/models", key="right-key")[0] == 200
    assert ask(auth, "/health")[0] == 200
    assert ask(AuthMiddleware(echo, "bot", None), "/v1/models")[0] == 200


def test_only_the_one_model_is_there():
    auth = AuthMiddleware(echo, "bot", None)
    status, answer = ask(auth, CHAT, {"model": "gpt2"})
    assert status == 404
    assert answer["error"] == {
        "message": "There is no model 'gpt2'; the model is bot.", "type": "invalid_request_error",
        "param": "model", "code": "model_not_found",
    }  # fmt: skip
    assert ask(auth, CHAT, {"model": "bot"}) == (200, {"model": "bot"})
    assert ask(auth, CHAT, ["not", "an", "object"])[0] == 200  # the server's to refuse
    assert ask(auth, "/v1/models/bot")[1]["id"] == "bot"
    assert ask(auth, "/v1/models/gpt2")[0] == 404
    assert ask(AuthMiddleware(echo, "bot", "key"), "/v1/models/bot")[0] == 401


def test_what_the_server_would_ignore_is_refused():
    auth = AuthMiddleware(echo, "bot", None, refused=frozenset({"audio"}))
    status, answer = ask(auth, CHAT, {"audio": {"voice": "x"}})
    assert status == 400 and answer["error"]["param"] == "audio"
    assert ask(auth, CHAT, {"audio": None, "n": 2})[0] == 200


@pytest.mark.parametrize(
    ("request_body", "param"),
    [({"messages": [{"content": "hi"}, {"content": f"a{END}b"}]}, "messages[1].content"),
     ({"messages": [{"content": [{"type": "text", "text": END}]}]}, "messages[0].content"),
     ({"messages": [{"content": [{"text": END[:4]}, {"text": END[4:]}]}]}, "messages[0].content"),
     ({"input": END}, "input"), ({"input": [{"content": END}]}, "input[0].content"),
     ({"instructions": END}, "instructions"),
     ({"messages": [{"role": f"user{END}", "content": "hi"}]}, "messages[0].role"),
     ({"messages": [{"role": "user", "name": END, "content": "hi"}]}, "messages[0].name"),
     ({"messages": [{"tool_calls": [{"function": {"name": END}}]}]}, "messages[0].tool_calls"),
     ({"messages": [{"content": [{"type": END}]}]}, "messages[0].content"),
     ({"tools": [{"function": {"parameters": {END: 1}}}]}, "tools[0].function"),
     ({"documents": [{"title": END}]}, "documents[0].title"),
     ({"chat_template_kwargs": {"date": END}}, "chat_template_kwargs")],
)  # fmt: skip
def test_special_tokens_in_messages_are_refused(request_body, param):
    auth = AuthMiddleware(echo, "bot", None, byte_tokenizer())
    status, answer = ask(auth, CHAT, request_body)
    assert status == 400 and answer["error"]["param"] == param
    assert "'<|im_end|>'" in answer["error"]["message"]
    odd = {"prompt": END, "messages": [None, 3, {"content": [{"text": 5}, 7]}]}
    assert ask(auth, CHAT, odd)[0] == 200


@pytest.mark.parametrize("kind", [b"", b"text/plain", b"application/x-www-form-urlencoded"])
def test_other_content_types_are_refused(kind):
    status, answer = ask(AuthMiddleware(echo, "bot", None), CHAT, {}, kind=kind)
    assert status == 415 and "must be application/json" in answer["error"]["message"]


def test_body_that_does_not_come_is_refused(monkeypatch):
    monkeypatch.setattr("rlhf_core.serving.auth.BODY_SECONDS", 0.05)
    sent = []

    async def receive():
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b" ", "more_body": True}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": CHAT, "method": "POST", "headers": [(b"content-type", JSON)]}
    asyncio.run(AuthMiddleware(echo, "bot", None)(scope, receive, send))
    assert sent[0]["status"] == 408 and b"within 0.05 seconds" in sent[1]["body"]


def test_request_that_is_too_large_is_refused():
    body = {"messages": "x" * MAX_BODY_BYTES}
    assert ask(AuthMiddleware(echo, "bot", None), CHAT, body)[0] == 413


def test_web_sockets_are_closed():
    sent = []

    async def send(message):
        sent.append(message["type"])

    asyncio.run(
        AuthMiddleware(echo, "bot", None)({"type": "websocket", "path": "/v1/realtime"}, None, send)
    )
    assert sent == ["websocket.close"]
