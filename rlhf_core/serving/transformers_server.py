"""The server for one model that transformers runs: `api` by uvicorn, in this process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is loaded from elsewhere

import uvicorn

from rlhf_core.chat.model import ChatModel, load_chat_model
from rlhf_core.serving.api import Api
from rlhf_core.serving.auth import AuthMiddleware
from rlhf_core.serving.generator import Generator
from rlhf_core.serving.listening import SHUTDOWN_SECONDS, listen, url_of


def application(name: str, chat_model: ChatModel, key: str | None) -> AuthMiddleware:
    """The server as an ASGI application, with the checks in front."""
    api = Api(name, Generator(chat_model))
    return AuthMiddleware(api.application(), name, key, chat_model.tokenizer)


class _Server(uvicorn.Server):
    """Calls ``ready`` once it answers, and does not raise the signal again when it ends."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # A reply that is cut off by the shutdown is not an error of the server.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle_exit)
        yield


def serve(
    folder: Path,
    *,
    name: str,
    host: str,
    port: int,
    key: str | None,
    on_ready: Callable[[str], None],
) -> None:
    """Serve until Ctrl-C or SIGTERM. See `engine.main`."""
    with listen(host, port) as listener:
        run(application(name, load_chat_model(folder), key), listener, host, on_ready)


def run(
    app: AuthMiddleware, listener: socket.socket, host: str, on_ready: Callable[[str], None]
) -> None:
    """Serve an application until Ctrl-C or SIGTERM, and end the process."""
    config = uvicorn.Config(
        app, log_level="warning", lifespan="on", timeout_graceful_shutdown=SHUTDOWN_SECONDS
    )
    server = _Server(config, lambda: on_ready(url_of(listener, host)))
    asyncio.run(server.serve(sockets=[listener]))
    sys.stdout.flush()
    sys.stderr.flush()
    # A thread may still work on an abandoned request; a normal exit would wait for it.
    os._exit(0)
