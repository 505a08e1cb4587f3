"""`rlhf serve` by vLLM, on a CPU, with the real OpenAI client."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from rlhf_core.store import open_store
from rlhf_core.system.ports import free_ports
from tests.rlhf_core.tiny_models import wide_copy

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ROOT = Path(__file__).parents[3]
KEY = "a-key-for-tests"
HELLO = [{"role": "user", "content": "Hello"}]


class Server:
    def __init__(self, folder, model, *, key=None):
        store = open_store(str(folder / "store"))
        self.folder = model
        artifact = store.publish(model, kind="model", metadata={"name": "tiny-chat"})
        self.port = free_ports(1)[0]
        self.url = f"http://127.0.0.1:{self.port}"
        environment = {
            **os.environ, "RLHF_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT),
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }  # fmt: skip
        environment |= {"RLHF_API_KEY": key} if key else {}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli.main", "serve", artifact.digest,
             "--port", str(self.port), "--store", str(folder / "store")],
            cwd=folder, env=environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.children = []

    def wait(self):
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    main = psutil.Process(self.process.pid)
                    self.children = main.children(recursive=True)
                    return self
            except httpx.HTTPError:
                time.sleep(0.3)
        os.killpg(self.process.pid, signal.SIGKILL)
        raise AssertionError(self.process.communicate()[0])

    def left(self):
        """Processes of vLLM's that are still there."""
        _, alive = psutil.wait_procs(self.children, timeout=15)
        return [child for child in alive if child.is_running() and child.status() != "zombie"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    found = Server(folder, wide_copy("llama", folder / "model"), key=KEY).wait()
    yield found
    if found.process.poll() is None:
        os.killpg(found.process.pid, signal.SIGKILL)
        found.process.wait()


@pytest.fixture
def client(server):
    import openai

    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


def test_reply_is_the_models_with_its_own_chat_template(server, client):
    import torch

    from rlhf_core.chat.model import load_chat_model
    from rlhf_core.data.encoding.templates import prompt_ids

    assert [model.id for model in client.models.list()] == ["tiny-chat"]
    answer = client.chat.completions.create(
        model="tiny-chat", messages=HELLO, temperature=0, max_completion_tokens=6
    )
    assert answer.model == "tiny-chat" and answer.usage.completion_tokens == 6
    chat_model = load_chat_model(server.folder)
    ids = torch.tensor([prompt_ids(chat_model.tokenizer, HELLO)])
    assert answer.usage.prompt_tokens == ids.shape[1]
    output = chat_model.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
    )
    expected = chat_model.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer.choices[0].message.content == expected


def test_reply_is_streamed_and_sampled_by_default(client):
    def stream(**options):
        chunks = client.chat.completions.create(
            model="tiny-chat", messages=HELLO, max_tokens=12, stream=True, **options
        )
        return [c.choices[0].delta.content for c in chunks if c.choices[0].delta.content]

    pieces = stream(temperature=0)
    assert len(pieces) > 3
    assert stream(temperature=0) == pieces
    assert len({"".join(stream()) for _ in range(4)}) > 1


def test_only_the_models_own_paths_are_open_and_only_with_the_key(server, client):
    import openai

    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="another", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    with pytest.raises(openai.NotFoundError, match="the model is tiny-chat"):
        client.chat.completions.create(model="gpt2", messages=HELLO)
    # vLLM itself answers at these without a key.
    for path in ("/invocations", "/tokenize", "/v1/load_lora_adapter"):
        assert httpx.post(f"{server.url}{path}", json={"messages": HELLO}).status_code == 404
    assert httpx.get(f"{server.url}/metrics").status_code == 404
    main = psutil.Process(server.process.pid)
    listening = [c for p in (main, *server.children) if p.is_running() and p.status() != "zombie"
                 for c in p.net_connections() if c.status == "LISTEN"]  # fmt: skip
    assert {c.laddr.ip for c in listening} <= {"127.0.0.1", "::1"}


def test_sigterm_during_a_reply_leaves_no_process(server, client):
    chunks = iter(
        client.chat.completions.create(
            model="tiny-chat", messages=HELLO, max_tokens=900, stream=True
        )
    )
    next(chunks)
    assert server.children, "the engine is a process of its own"
    server.process.send_signal(signal.SIGTERM)
    output, _ = server.process.communicate(timeout=60)
    assert server.process.returncode == 0, output
    assert "Traceback" not in output and "model tiny-chat" in output
    assert server.left() == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")


@pytest.mark.parametrize("end", ["ctrl-c", "kill"])
def test_no_process_is_left(tmp_path, end):
    server = Server(tmp_path, wide_copy("llama", tmp_path / "model")).wait()
    if end == "ctrl-c":  # a terminal sends it to all processes
        os.killpg(server.process.pid, signal.SIGINT)
        output, _ = server.process.communicate(timeout=60)
        assert server.process.returncode == 0, output
        assert "Traceback" not in output
    else:
        server.process.kill()
        server.process.wait()
    assert server.left() == []
