"""ASGI middleware in front of either server: API key, paths, the model's name, the request's body.

vLLM's server checks its key only below /v1: `/invocations`, which generates too, `/tokenize` and
`/metrics` are open to everyone. It reads special tokens in messages as if its template had written
them, and waits for a body for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import Iterator
from typing import Any

from rlhf_core.data.encoding.templates import find_special_token
from rlhf_core.serving.api_error import ApiError, unsupported
from rlhf_core.system.asgi import App, Receive, Scope, Send, answer_json, replayed

PUBLIC_PATHS = {"/health"}
API_PATHS = frozenset({"/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/responses"})
MODEL_PATH = "/v1/models/"
MAX_BODY_BYTES = 16 * 2**20
BODY_SECONDS = 30.0  # in which a request's body must have come
# vLLM's roles and names are free, and its templates also write tools and documents.
TEMPLATED = ("instructions", "messages", "input", "tools", "documents", "chat_template_kwargs")
STARTED = int(time.time())


class AuthMiddleware:
    """An ASGI application in front of another one.

    Args:
        name: of the served model; requests for other models are rejected.
        key: API key that clients send as `Authorization: Bearer KEY`; None: no key is needed.
        tokenizer: of the model; messages with its special tokens are rejected.
        refused: parameters that the server would ignore.
        paths: that there are, beside /health.
    """

    def __init__(
        self,
        app: App,
        name: str,
        key: str | None,
        tokenizer: Any = None,
        refused: frozenset[str] = frozenset(),
        paths: frozenset[str] = API_PATHS,
    ) -> None:
        self.app = app
        self.name = name
        self.key = key
        self.tokenizer = tokenizer
        self.refused = refused
        self.paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] != "http":
            await self.app(scope, receive, send)
        else:
            try:
                await self._answer(scope, receive, send)
            except ApiError as error:
                await answer_json(send, error.status, error.body)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].rstrip("/")
        if path in PUBLIC_PATHS:
            await self.app({**scope, "path": path}, receive, send)
            return
        of_model = path.startswith(MODEL_PATH) and self.paths is API_PATHS
        if path not in self.paths and not of_model:
            paths = ", ".join(sorted(self.paths))
            raise ApiError(f"There is no path {scope['path']}; the paths are {paths}.", status=404)
        if not self._is_authorised(scope):
            raise ApiError("The API key is wrong or missing.", code="invalid_api_key", status=401)
        if of_model:
            self._check_model(path.removeprefix(MODEL_PATH))
            await answer_json(send, 200, json.dumps(model_entry(self.name)).encode())
        elif scope["method"] != "POST":
            await self.app({**scope, "path": path}, receive, send)
        else:
            body = await read_body(scope, receive)
            with contextlib.suppress(ValueError):  # the server reports malformed JSON
                self._check(json.loads(body))
            whole = {"type": "http.request", "body": body, "more_body": False}
            await self.app({**scope, "path": path}, replayed([whole], receive), send)

    def _check(self, request: Any) -> None:
        """Raise ApiError for another model, a refused parameter or a message's special token."""
        if not isinstance(request, dict):
            return
        self._check_model(request.get("model"))
        if found := [name for name, value in request.items() if name in self.refused and value]:
            raise unsupported(found[0])
        for param, text in _texts(request) if self.tokenizer is not None else ():
            if found := find_special_token(self.tokenizer, text):
                raise ApiError(
                    f"{param} contains {found!r}, which this model reads as a special token; take "
                    "it out of the text.",
                    param=param,
                    code="invalid_value",
                )

    def _check_model(self, wanted: Any) -> None:
        if wanted not in (None, self.name):
            text = f"There is no model {str(wanted)[:100]!r}; the model is {self.name}."
            raise ApiError(text, param="model", code="model_not_found", status=404)

    def _is_authorised(self, scope: Scope) -> bool:
        if self.key is None:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, f"Bearer {self.key}".encode())


def model_entry(name: str) -> dict[str, Any]:
    """The model in /v1/models."""
    return {"id": name, "object": "model", "created": STARTED, "owned_by": "rlhf"}


def _texts(request: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Parameter and text of all that a chat template may write, of whatever form; the server checks
    the form. The parts of a message are put together, as the server does: a token may be spread
    over them."""
    for name in TEMPLATED:
        items = request.get(name)
        for i, item in enumerate(items if isinstance(items, list) else [items]):
            where = name if item is items else f"{name}[{i}]"
            fields = item if isinstance(item, dict) else {"content": item}
            for field, value in fields.items():
                param = where if item is items else f"{where}.{field}"
                parts = value if isinstance(value, list) else [value]
                texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
                yield param, "".join(text for text in texts if isinstance(text, str))
                yield from ((param, text) for text in _strings({field: value}))


def _strings(value: Any) -> Iterator[str]:
    """All strings in a JSON value, names of fields included."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            left += value


async def read_body(scope: Scope, receive: Receive) -> bytes:
    """A request's JSON.

    Raises:
        ApiError: it is announced as something else, has more than MAX_BODY_BYTES, or does not come
            within BODY_SECONDS.
    """
    kind = dict(scope["headers"]).get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != b"application/json":  # a web page of another site can send others without asking
        found = kind.decode("latin-1") or "missing"
        text = f"The Content-Type is {found}; it must be application/json."
        raise ApiError(text, code="unsupported_content_type", status=415)
    body = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError("The client has left.")
                body += message.get("body", b"")
                if len(body) > MAX_BODY_BYTES:
                    text = f"The request has more than {MAX_BODY_BYTES} bytes."
                    raise ApiError(text, code="request_too_large", status=413)
                if not message.get("more_body"):
                    return body
    except TimeoutError as error:
        text = f"The request's body did not come within {BODY_SECONDS:g} seconds."
        raise ApiError(text, code="request_timeout", status=408) from error
