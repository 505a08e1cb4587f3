"""`rlhf serve` with the real OpenAI client, and who may reach what the commands open."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import httpx
import psutil
import pytest

from flows.cli.access import password_for
from rlhf_core.errors import ConfigError
from rlhf_core.store import open_store
from rlhf_core.system.local import is_local
from rlhf_core.system.ports import free_ports
from tests import forked
from tests.rlhf_core.playground.tiny_run import tiny_run

ROOT = Path(__file__).parents[3]
KEY = "a-key-for-tests"


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.3.2.1", True), ("localhost", True), ("::1", True),
     ("0.0.0.0", False), ("10.0.0.4", False), ("::", False), ("my-host", False)],
)  # fmt: skip
def test_local_addresses(host, local):
    assert is_local(host) is local


def test_other_machines_need_a_password(monkeypatch):
    monkeypatch.delenv("SOME_PASSWORD", raising=False)
    assert password_for("127.0.0.1", "SOME_PASSWORD", "the page") is None
    with pytest.raises(ConfigError, match=r"gives other machines access, .* set SOME_PASSWORD"):
        password_for("0.0.0.0", "SOME_PASSWORD", "the page")
    monkeypatch.setenv("SOME_PASSWORD", "short")
    with pytest.raises(ConfigError, match="has 5 characters; expected at least 8"):
        password_for("0.0.0.0", "SOME_PASSWORD", "the page")
    monkeypatch.setenv("SOME_PASSWORD", "long enough")
    assert password_for("127.0.0.1", "SOME_PASSWORD", "the page") == "long enough"


class Server:
    def __init__(self, folder, *arguments, key=KEY):
        self.run = tiny_run(open_store(str(folder / "store")))
        self.port = free_ports(1)[0]
        environment = {**os.environ, "RLHF_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}
        environment |= {"RLHF_API_KEY": key} if key else {}
        self.process = forked.start(
            "-m", "flows.cli.main", "serve", *arguments, "--port", str(self.port),
            "--store", str(folder / "store"), "--engine", "transformers",
            cwd=folder, env=environment, needs=forked.MODELS, output=folder / "output",
        )  # fmt: skip
        self.url = f"http://127.0.0.1:{self.port}"

    def wait(self):
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return self
            except httpx.HTTPError:
                time.sleep(0.2)
        self.process.kill()
        raise AssertionError(self.process.communicate()[0])


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pytest.importorskip("openai")
    found = Server(tmp_path_factory.mktemp("serve")).wait()
    yield found
    found.process.kill()
    found.process.wait()


@pytest.fixture
def client(server):
    import openai

    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


HELLO = [{"role": "user", "content": "Hello"}]


@pytest.mark.slow
def test_published_model_is_listed_by_its_name(client):
    assert [model.id for model in client.models.list()] == ["tiny-chat"]


@pytest.mark.slow
def test_reply_is_the_published_models(server, client):
    answer = client.chat.completions.create(
        model="tiny-chat", messages=HELLO, temperature=0, max_completion_tokens=6
    )
    assert answer.model == "tiny-chat"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 6
    import torch

    from rlhf_core.chat.model import load_chat_model
    from rlhf_core.data.encoding.templates import prompt_ids

    chat_model = load_chat_model(server.run.store.fetch(server.run.stages["ppo"]))
    ids = torch.tensor([prompt_ids(chat_model.tokenizer, HELLO)])
    assert answer.usage.prompt_tokens == ids.shape[1]
    mask = torch.ones_like(ids)
    output = chat_model.model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    expected = chat_model.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer.choices[0].message.content == expected


@pytest.mark.slow
def test_reply_is_streamed_and_temperature_counts(client):
    def stream(temperature):
        chunks = client.chat.completions.create(
            model="tiny-chat", messages=HELLO, max_tokens=12, temperature=temperature, stream=True
        )
        return [c.choices[0].delta.content for c in chunks if c.choices[0].delta.content]

    pieces = stream(0)
    assert len(pieces) > 3
    assert "".join(stream(0)) == "".join(pieces)
    assert len({"".join(stream(1.5)) for _ in range(4)}) > 1


@pytest.mark.slow
def test_wrong_key_and_wrong_model_are_refused(server, client):
    import openai

    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="another", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    with pytest.raises(openai.NotFoundError, match="the model is tiny-chat"):
        client.chat.completions.create(model="gpt2", messages=HELLO)
    assert client.models.list().data


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_server_ends_cleanly_while_it_replies(tmp_path, number):
    openai = pytest.importorskip("openai")
    server = Server(tmp_path, "sft", "--name", "mine", key=None).wait()
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    chunks = iter(
        client.chat.completions.create(
            model="mine", messages=HELLO, max_tokens=900, stream=True, logit_bias={"77": 100}
        )
    )
    next(chunks)
    children = psutil.Process(server.process.pid).children(recursive=True)
    server.process.send_signal(number)
    output, _ = server.process.communicate(timeout=30)
    assert server.process.returncode == 0, output
    assert "Traceback" not in output and "model mine" in output
    assert [child for child in children if child.is_running()] == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")


@pytest.mark.slow
def test_taken_port_is_one_message(server, tmp_path):
    second = Server(tmp_path)
    second.process.kill()
    done = forked.run(
        "-m", "flows.cli.main", "serve", "--port", str(server.port),
        "--store", str(tmp_path / "store"), "--engine", "transformers",
        cwd=tmp_path, env={**os.environ, "RLHF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
        needs=forked.MODELS,
    )  # fmt: skip
    assert done.returncode == 1
    assert "cannot be used" in done.stderr and "--port" in done.stderr
