"""transformers' server (`transformers serve`) with one model that is loaded already.

By default it names the model by its folder, lists the models of the hub's cache, and loads other
models on request. `OneModel` is its model manager with these three things changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a request must not load anything from elsewhere

import uvicorn
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import GenerationState

from rlhf_core.chat.model import ChatModel, Sampling, load_chat_model
from rlhf_core.serving.auth import AuthMiddleware
from rlhf_core.serving.listening import SHUTDOWN_SECONDS, listen, url_of


class OneModel(ModelManager):
    """A model manager with one model, under its published name."""

    def __init__(self, name: str, chat_model: ChatModel) -> None:
        super().__init__(device=chat_model.device)
        self.force_model = name  # for requests that name none
        self._chat_model = chat_model
        self._since = int(time.time())

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """The name without a revision added."""
        return model_id

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """The loaded model and its tokenizer, whatever is requested."""
        return self._chat_model.model, self._chat_model.tokenizer

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:  # type: ignore[override]
        """The list of /v1/models."""
        return [
            {"id": self.force_model, "object": "model", "created": self._since, "owned_by": "rlhf"}
        ]

    def shutdown(self) -> None:
        """The model stays until the process ends."""


def application(name: str, chat_model: ChatModel, key: str | None) -> AuthMiddleware:
    """The server as an ASGI application, with the authentication in front."""
    sample_by_default(chat_model.model.generation_config)
    manager = OneModel(name, chat_model)
    state = GenerationState(continuous_batching=False, compile=False)
    served = build_server(
        manager,
        ChatCompletionHandler(manager, state),
        completion_handler=CompletionHandler(manager, state),
        response_handler=ResponseHandler(manager, state),
        transcription_handler=TranscriptionHandler(manager, state),
        generation_state=state,
    )
    return AuthMiddleware(served, name, key)


def sample_by_default(config: Any) -> None:
    """Switch sampling on in a model's generation config, so that a request's temperature applies.

    The server only ever switches it off. A model with its own sampling settings keeps them; others
    get the defaults of `rlhf chat`.
    """
    if not config.do_sample:
        config.update(**Sampling().options())


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
        app = application(name, load_chat_model(folder), key)
        config = uvicorn.Config(
            app, log_level="warning", lifespan="on", timeout_graceful_shutdown=SHUTDOWN_SECONDS
        )
        server = _Server(config, lambda: on_ready(url_of(listener, host)))
        asyncio.run(server.serve(sockets=[listener]))
    sys.stdout.flush()
    sys.stderr.flush()
    # A thread may still generate an abandoned reply; a normal exit would wait for it.
    os._exit(0)
