"""What ASGI middleware is made of: types, a whole answer, and a request that was read before."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


async def answer_json(send: Send, status: int, body: bytes) -> None:
    """Send an answer whose body is JSON."""
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def read_whole(receive: Receive) -> list[Message]:
    """The messages of a request, its whole body."""
    messages = [await receive()]
    while messages[-1].get("more_body", False):
        messages.append(await receive())
    return messages


def replayed(messages: list[Message], receive: Receive) -> Receive:
    """Receives messages that were received before, once more, then further ones."""
    left = iter(messages)

    async def again() -> Message:
        return message if (message := next(left, None)) is not None else await receive()

    return again
