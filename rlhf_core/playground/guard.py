"""ASGI middleware in front of the page: what may be asked of it, and what its browser may load."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass, field

from rlhf_core.system.asgi import (
    App,
    Message,
    Receive,
    Scope,
    Send,
    answer_json,
    read_whole,
    replayed,
)

WRONG_PASSWORD_SECONDS = 1.0
MAX_BODY_BYTES = 2**20
LOGIN = "/login"

# What the page posts: events and the login. No uploads, recordings or other APIs of Gradio.
POSTED = re.compile(r"/login/?|/gradio_api/(queue/join|cancel|reset|run/\w+)/?")
# Gradio fetches these URLs and passes their contents on.
FETCHING = re.compile(r"/gradio_api/(proxy=|file=https?:|stream/|run-history)|.*/vibe-")

# Gradio starts itself by inline scripts, and its components have inline styles.
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; manifest-src "
        "'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'self'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


@dataclass
class _Turn:
    """The logins of one address come one after the other."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: int = 0


class Guard:
    """An ASGI application in front of Gradio's.

    A wrong password takes WRONG_PASSWORD_SECONDS, during which further logins from its address
    wait; they hold no thread, and logins from other addresses do not wait.
    """

    def __init__(self, app: App) -> None:
        self.app = app
        self._turns: dict[str, _Turn] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        send = _with_headers(send)
        path, method = scope["path"], scope["method"]
        if FETCHING.match(path) or (method == "POST" and not POSTED.fullmatch(path)):
            await _refuse(send, 403, "This page has no such function.")
        elif method == "POST" and _is_of_another_page(scope):
            await _refuse(send, 403, "Only this page's own scripts may post to it.")
        elif method not in ("GET", "HEAD", "POST"):
            await _refuse(send, 405, "This page is read and used by GET and POST.")
        elif _length(scope) > MAX_BODY_BYTES:
            await _refuse(send, 413, f"A request has at most {MAX_BODY_BYTES} bytes.")
        elif path.rstrip("/") == LOGIN:
            await self._login(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _login(self, scope: Scope, receive: Receive, send: Send) -> None:
        # before its turn: one that comes slowly holds up nobody
        body = replayed(await read_whole(receive), receive)
        address = (scope.get("client") or ("",))[0]
        turn = self._turns.setdefault(address, _Turn())
        turn.waiting += 1
        try:
            async with turn.lock:
                await self.app(scope, body, _slow_to_refuse(send))
        finally:
            turn.waiting -= 1
            if not turn.waiting:
                self._turns.pop(address, None)


def _slow_to_refuse(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] >= 400:
            await asyncio.sleep(WRONG_PASSWORD_SECONDS)
        await send(message)

    return sending


def _with_headers(send: Send) -> Send:
    added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *added]}
        await send(message)

    return sending


def _is_of_another_page(scope: Scope) -> bool:
    """Whether a browser says that a page of another origin has sent this."""
    said = dict(scope["headers"]).get(b"sec-fetch-site", b"same-origin")
    return said not in (b"same-origin", b"none")


def _length(scope: Scope) -> int:
    """Announced bytes of the body; one that is not announced counts as too long."""
    headers = dict(scope["headers"])
    if b"transfer-encoding" in headers:
        return MAX_BODY_BYTES + 1
    given = headers.get(b"content-length", b"0")
    return int(given) if given.isdigit() else MAX_BODY_BYTES + 1


async def _refuse(send: Send, status: int, text: str) -> None:
    await answer_json(send, status, json.dumps({"detail": text}).encode())
