"""ASGI middleware that checks the API key, the path and the model of a request.

transformers' server has no API key, loads any model of the hub on request, and ignores
`max_completion_tokens`, the current name of the longest reply. vLLM's server checks its key only
below /v1: `/invocations`, which generates too, `/tokenize` and `/metrics` are open to everyone.
"""

from __future__ import annotations

import contextlib
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PUBLIC_PATHS = {"/health"}
API_PATHS = {"/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/responses"}
MAX_BODY_BYTES = 16 * 2**20


class AuthMiddleware:
    """An ASGI application in front of another one.

    Args:
        name: of the served model; requests for other models are rejected.
        key: API key that clients send as `Authorization: Bearer KEY`; None: no key is needed.
    """

    def __init__(self, app: App, name: str, key: str | None) -> None:
        self.app = app
        self.name = name
        self.key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"].rstrip("/")
        if path not in API_PATHS | PUBLIC_PATHS:
            paths = ", ".join(sorted(API_PATHS))
            await refuse(send, 404, f"There is no path {path}; the paths are {paths}.")
        elif path in API_PATHS and not self._is_authorised(scope):
            await refuse(send, 401, "The API key is wrong or missing.")
        elif scope["method"] != "POST":
            await self.app({**scope, "path": path}, receive, send)
        else:
            await self._post(scope, path, receive, send)

    async def _post(self, scope: Scope, path: str, receive: Receive, send: Send) -> None:
        body = await read_body(receive)
        if body is None:
            await refuse(send, 413, f"The request has more than {MAX_BODY_BYTES} bytes.")
            return
        with contextlib.suppress(ValueError):  # the server reports malformed JSON
            request = json.loads(body)
            if isinstance(request, dict):
                if (wanted := request.get("model")) not in (None, self.name):
                    text = f"There is no model {str(wanted)[:100]!r}; the model is {self.name}."
                    await refuse(send, 404, text)
                    return
                body = json.dumps(rename_fields(request)).encode()
        scope, receive = _replayed(scope, path, body, receive)
        await self.app(scope, receive, send)

    def _is_authorised(self, scope: Scope) -> bool:
        if self.key is None:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, f"Bearer {self.key}".encode())


def rename_fields(request: dict[str, Any]) -> dict[str, Any]:
    """A request with the field names that transformers' server understands."""
    longest = request.pop("max_completion_tokens", None)
    if longest is not None and request.get("max_tokens") is None:
        request["max_tokens"] = longest
    return request


async def read_body(receive: Receive) -> bytes | None:
    """A request's body; None if it has more than MAX_BODY_BYTES."""
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return body
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            return None
        if not message.get("more_body"):
            return body


def _replayed(scope: Scope, path: str, body: bytes, receive: Receive) -> tuple[Scope, Receive]:
    headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
    headers.append((b"content-length", str(len(body)).encode()))
    sent = False

    async def again() -> MutableMapping[str, Any]:
        nonlocal sent
        if sent:
            return await receive()  # a disconnection
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return {**scope, "path": path, "headers": headers}, again


async def refuse(send: Send, status: int, text: str) -> None:
    """Send an error response in OpenAI's format."""
    body = json.dumps({"error": {"message": text, "type": "invalid_request_error"}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
