"""Writers of a server on SQLite take turns, instead of refusing each other.

Prefect begins its transactions as readers. One that has read and then wants to write is refused at
once, "database is locked", where another has written meanwhile: SQLite would have to let it act on
what it read before. SQLite's timeout does not help. The server answers 503, and although Prefect's
clients repeat that a few times, a busy server loses runs: a worker that cannot note its name on a
run reports it as crashed.

Here one request at a time may write, in the order of arrival. The server's own services still come
between, so a request that is answered 503 is repeated, while the others wait. Nothing of it was
written: its transaction was rolled back. PostgreSQL needs none of this.

For the same reason Prefect 3.9 answers at most 100 requests at once on SQLite, and counts streams
of events among them. A pipeline holds two as long as it runs, so that the server of 50 pipelines
would never answer again. Here streams do not count.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

from fastapi import FastAPI
from prefect.server.api.server import RequestLimitMiddleware
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL

from rlhf_core.system.asgi import App, Message, Receive, Scope, Send, read_whole, replayed

READS = ("/filter", "/count", "/paginate", "/history", "/lateness", "/validate", "/get_latest")
"""Ends of paths that are asked by POST and only read."""
REPEATS = 100
PAUSE = 0.05  # seconds between two of them
UNAVAILABLE = 503


class Turns:
    """ASGI middleware: requests that may write are answered one after another."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.lock = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _writes(scope):
            await self.app(scope, receive, send)
            return
        request = await read_whole(receive)
        async with self.lock:
            answer = await self._answer(scope, request, receive)
            for _ in range(REPEATS):
                if answer[0].get("status") != UNAVAILABLE:
                    break
                await asyncio.sleep(PAUSE)
                answer = await self._answer(scope, request, receive)
        for message in answer:
            await send(message)

    async def _answer(
        self, scope: Scope, request: list[Message], receive: Receive
    ) -> list[Message]:
        """The messages with which the server answers."""
        answer: list[Message] = []

        async def send(message: Message) -> None:
            answer.append(message)

        try:
            await self.app({**scope}, replayed(request, receive), send)
        except Exception:
            if not answer:
                raise
            # Starlette has answered and Prefect has logged it; it is raised for the server's log
        return answer


def _writes(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
        return False
    return not scope["path"].rstrip("/").endswith(READS)


class RequestLimit(RequestLimitMiddleware):
    """Prefect's limit of requests at once, which streams of events are not."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self.app(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def for_database(app: FastAPI) -> App:
    """The server's app; if its database is SQLite, in turns, and with any number of streams."""
    if not PREFECT_API_DATABASE_CONNECTION_URL.value().startswith("sqlite"):
        return cast(App, app)
    for middleware in app.user_middleware:
        found: Any = middleware
        if found.cls is RequestLimitMiddleware:
            found.cls = RequestLimit
    return Turns(cast(App, app))
