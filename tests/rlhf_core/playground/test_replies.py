"""Real (tiny) models of a run in a store."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from rlhf_core.chat.model import Sampling, load_chat_model
from rlhf_core.data.encoding.templates import prompt_ids
from rlhf_core.jobs.ensemble import CombineSettings
from rlhf_core.models.loading import load_scalar_model
from rlhf_core.models.saving import save_scalar_model
from rlhf_core.playground.catalogue import Choice, RewardModels
from rlhf_core.playground.pool import ModelPool
from rlhf_core.playground.replies import ReplyGenerator
from rlhf_core.store import open_store
from tests.rlhf_core.playground.tiny_run import tiny_run

GREEDY = Sampling(max_new_tokens=6, temperature=0)
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_HOME", str(tmp_path / "home"))
    return tiny_run(open_store(str(tmp_path / "store")))


@pytest.fixture
def generator(run):
    return ReplyGenerator(run.store, ModelPool(10**9))


def ask(generator, digests, sampling=GREEDY, **more):
    choices = [Choice(digest[:6], digest) for digest in digests]
    return list(generator.generate(choices, [HELLO] * len(choices), sampling, **more))


def scored_by(*digests, **combine):
    return RewardModels(digests, CombineSettings(**combine))


def test_replies_grow_and_are_the_models_own(run, generator):
    digests = [run.stages["sft"], run.stages["ppo"]]
    seen = ask(generator, digests)
    assert [reply.state for reply in seen[0]] == ["waiting", "waiting"]
    assert [(reply.state, reply.error) for reply in seen[-1]] == [("done", "")] * 2
    assert len(seen) > 4
    for index, digest in enumerate(digests):
        lengths = [len(replies[index].text) for replies in seen]
        assert lengths == sorted(lengths)
        chat_model = load_chat_model(run.store.fetch(digest))
        ids = torch.tensor([prompt_ids(chat_model.tokenizer, HELLO)])
        expected = chat_model.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
        )[0, ids.shape[1] :]
        text = chat_model.tokenizer.decode(expected, skip_special_tokens=True)
        assert seen[-1][index].text == text
    assert seen[-1][0].text != seen[-1][1].text
    assert sorted(generator.pool.loaded()) == sorted(digests)


def test_score_is_the_reward_models(run, generator):
    [reply] = ask(generator, [run.stages["ppo"]], reward_models=scored_by(run.stages["reward"]))[-1]
    folder = run.store.fetch(run.stages["reward"])
    chat_model = load_chat_model(run.store.fetch(run.stages["ppo"]))
    end = chat_model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = prompt_ids(chat_model.tokenizer, HELLO)
    ids += chat_model.tokenizer(reply.text.strip(), add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([[*ids, end]])
    with torch.no_grad():
        expected = float(
            load_scalar_model(folder)(tokens, torch.ones_like(tokens, dtype=torch.bool))
        )
    assert reply.score == pytest.approx(expected, abs=1e-5)


def test_score_of_an_ensemble_is_its_members_combined(run, generator, tmp_path):
    folder = run.store.fetch(run.stages["reward"], tmp_path / "second")
    second = load_scalar_model(folder)
    second.mean += 2.0
    save_scalar_model(second, tmp_path / "changed", folder)
    other = run.store.publish(tmp_path / "changed", kind="reward_model").digest
    both = (run.stages["reward"], other)
    ppo = [run.stages["ppo"]]
    first, last = (ask(generator, ppo, reward_models=scored_by(d))[-1][0].score for d in both)
    assert first != last
    for how, expected in (
        ({}, (first + last) / 2), ({"combine": "min"}, min(first, last)),
        ({"combine": "mean_minus_std", "std_coef": 2.0}, (first + last) / 2 - abs(first - last)),
    ):  # fmt: skip
        [reply] = ask(generator, ppo, reward_models=scored_by(*both, **how))[-1]
        assert reply.score == pytest.approx(expected, abs=1e-5)


def test_missing_or_damaged_model_is_told_and_the_other_answers(run, generator):
    blob = run.store.get(run.stages["sft"]).file("model.safetensors").sha256
    path = run.store.url.removeprefix("file://") + f"/blobs/sha256/{blob[:2]}/{blob}"
    os.chmod(path, 0o644)
    with open(path, "r+b") as file:
        file.truncate(1000)
    missing = "d" * 64
    digests = [run.stages["sft"], missing, run.stages["ppo"], run.stages["reward"]]
    damaged, gone, fine, reward = ask(generator, digests)[-1]
    assert (fine.state, damaged.state, gone.state) == ("done", "failed", "failed")
    assert "model.safetensors" in damaged.error
    assert "there is no artifact" in gone.error
    assert "is a reward model" in reward.error
    replies = ask(generator, [run.stages["ppo"]], reward_models=scored_by(missing))[-1]
    assert replies[0].state == "done" and "there is no artifact" in replies[0].score_error


def test_stop_ends_the_replies_and_keeps_what_was_said(run, generator):
    stop = threading.Event()
    long = Sampling(max_new_tokens=100_000)
    choices = [Choice("PPO", run.stages["ppo"])]
    for replies in generator.generate(choices, [HELLO], long, stop=stop):
        if replies[0].text:
            stop.set()
    assert replies[0].state == "done" and replies[0].text


def test_special_token_in_a_message_is_refused(run, generator):
    choices = [Choice("PPO", run.stages["ppo"])]
    said = [[{"role": "user", "content": "a <|im_end|> b"}]]
    [reply] = list(generator.generate(choices, said, GREEDY))[-1]
    assert reply.state == "failed" and "special token" in reply.error
