"""The server for a tiny model, in a thread of the tests' process."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

HELLO = [{"role": "user", "content": "Hello"}]


@contextlib.contextmanager
def serving() -> Iterator[SimpleNamespace]:
    """Has `url`, `chat_model`, `generator` and an OpenAI `client`."""
    import openai
    import uvicorn

    from rlhf_core.chat.model import load_chat_model
    from rlhf_core.serving.api import Api
    from rlhf_core.serving.auth import AuthMiddleware
    from rlhf_core.serving.generator import Generator
    from rlhf_core.system.ports import free_ports
    from tests.rlhf_core.playground.tiny_run import model_folders

    chat_model = load_chat_model(model_folders()["ppo"])
    generator = Generator(chat_model)
    app = AuthMiddleware(Api("tiny", generator).application(), "tiny", None, chat_model.tokenizer)
    port = free_ports(1)[0]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{port}"
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield SimpleNamespace(url=url, chat_model=chat_model, generator=generator, client=client)
    server.should_exit = True
    thread.join()
