"""What stands before the server, without a model."""

from __future__ import annotations

import asyncio
import json

import pytest

from rlhf_core.serving.auth import MAX_BODY_BYTES, AuthMiddleware


def ask(auth, path, body=None, key=None):
    """Status and JSON of one request."""
    data = b"" if body is None else json.dumps(body).encode()
    headers = [(b"content-length", str(len(data)).encode())]
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
    length = dict(scope["headers"])[b"content-length"]
    assert scope["method"] == "GET" or int(length) == len(body)
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


def test_newer_name_of_the_longest_reply_is_understood():
    path = "/v1/chat/completions"
    assert ask(AuthMiddleware(echo, "bot", None), path, {"max_completion_tokens": 5})[1] == {
        "max_tokens": 5
    }
    both = {"max_completion_tokens": 5, "max_tokens": 3}
    assert ask(AuthMiddleware(echo, "bot", None), path, both)[1] == {"max_tokens": 3}


def test_only_the_one_model_is_there():
    path, auth = "/v1/chat/completions", AuthMiddleware(echo, "bot", None)
    status, answer = ask(auth, path, {"model": "gpt2"})
    assert status == 404
    assert answer["error"]["message"] == "There is no model 'gpt2'; the model is bot."
    assert ask(auth, path, {"model": "bot"}) == (200, {"model": "bot"})
    assert ask(auth, path, ["not", "an", "object"])[0] == 200  # the server's to refuse


def test_request_that_is_too_large_is_refused():
    body = {"messages": "x" * MAX_BODY_BYTES}
    assert ask(AuthMiddleware(echo, "bot", None), "/v1/chat/completions", body)[0] == 413


def test_web_sockets_are_closed():
    sent = []

    async def send(message):
        sent.append(message["type"])

    asyncio.run(
        AuthMiddleware(echo, "bot", None)({"type": "websocket", "path": "/v1/realtime"}, None, send)
    )
    assert sent == ["websocket.close"]
