"""A reward model behind the reward protocol, as a real server, asked by the real client."""

from __future__ import annotations

import asyncio
import threading

import httpx
import pytest
import torch
import uvicorn

from rlhf_core.data.encoding.templates import end_of_turn, prompt_ids
from rlhf_core.errors import JudgeError
from rlhf_core.jobs.reward_services import HttpReward
from rlhf_core.models.loading import load_scalar_model, new_scalar_model
from rlhf_core.models.saving import save_scalar_model
from rlhf_core.nn.padding import rows_on
from rlhf_core.rewards.services import Item, Services
from rlhf_core.serving.auth import AuthMiddleware
from rlhf_core.serving.listening import listen, url_of
from rlhf_core.serving.reward_api import PATHS, RewardApi, RewardScorer
from tests.rlhf_core.tiny_models import copy_of

KEY = "a-key-of-the-test"
USER = [{"role": "user", "content": "Say hello"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("reward")
    source = copy_of("llama", base / "model")
    (base / "reward").mkdir()
    save_scalar_model(new_scalar_model(source, 3), base / "reward", source)
    return base / "reward"


@pytest.fixture(scope="module")
def scorer(folder):
    return RewardScorer(folder)


@pytest.fixture(scope="module")
def url(scorer):
    """Of a running server."""
    app = AuthMiddleware(RewardApi("tiny", scorer).application(), "tiny", KEY, paths=PATHS)
    with listen("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
        thread = threading.Thread(
            target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True
        )
        thread.start()
        yield url_of(listener, "127.0.0.1")
        server.should_exit = True
        thread.join(20)


def test_scores_are_those_of_the_model(url, scorer, folder, monkeypatch):
    monkeypatch.setenv("REWARD_KEY", KEY)
    services = Services([HttpReward(url=f"{url}/score", key_variable="REWARD_KEY")])
    given = [
        ("Hello you", True),
        ("Hello", False),
        ("", True),
        ("a longer reply, with a comma", True),
    ]
    (found,) = services.answers([Item(USER, reply, done, {}) for reply, done in given])
    services.close()
    model, tokenizer = load_scalar_model(folder), scorer.tokenizer
    for answer, (reply, done) in zip(found, given, strict=True):
        ids = prompt_ids(tokenizer, USER)
        ids += tokenizer(reply, add_special_tokens=False)["input_ids"] if reply else []
        ids += [end_of_turn(tokenizer)[1]] if done else []
        with torch.no_grad():
            want = float(model(*rows_on(torch.device("cpu"), [ids]))[0])
        assert answer.score == want, "to the bit: each reply is scored alone"
    assert len({answer.score for answer in found}) == 4


def test_special_tokens_in_a_reply_are_text(scorer):
    end, number = end_of_turn(scorer.tokenizer)
    ids = scorer.encode(USER, f"Hello{end}more", finished=False)
    assert number not in ids[len(prompt_ids(scorer.tokenizer, USER)) :]


def ask(url, body, key=KEY):
    return httpx.post(f"{url}/score", json=body, headers={"Authorization": f"Bearer {key}"})


@pytest.mark.parametrize(
    ("body", "key", "status", "text"),
    [
        ({"items": []}, "wrong", 401, "key is wrong"),
        ({"replies": []}, KEY, 400, "replies is not supported"),
        ({"items": [{"reply": "x"}]}, KEY, 400, "items[0].prompt is missing"),
        ({"items": [{"prompt": USER, "reply": 3}]}, KEY, 400, "items[0].reply"),
        ({"items": [{"prompt": USER, "reply": "word " * 5000}]}, KEY, 400, "and the model reads"),
    ],
)  # fmt: skip
def test_wrong_requests_are_told_what_is_wrong(url, body, key, status, text):
    reply = ask(url, body, key)
    assert reply.status_code == status and text in reply.json()["error"]["message"]


def test_other_paths_are_closed_and_health_is_open(url):
    assert httpx.get(f"{url}/health").json() == {"status": "ok", "model": "tiny"}
    assert httpx.post(f"{url}/v1/models/tiny", json={}).status_code == 404
    assert ask(url, {"items": []}).json() == {"scores": []}


def test_client_passes_on_what_the_server_says(url, monkeypatch):
    monkeypatch.setenv("REWARD_KEY", KEY)
    services = Services([HttpReward(url=f"{url}/score", key_variable="REWARD_KEY")])
    with pytest.raises(JudgeError, match=r"rejected the request .*the model reads"):
        services.answers([Item(USER, "word " * 5000, True, {})])
    services.close()
