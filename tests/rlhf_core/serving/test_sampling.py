"""Each row by its own request's parameters; oracles are hand values."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from rlhf_core.serving.sampling import Options, Sampler, defaults, draw

GREEDY = {"temperature": 0.0}


def test_penalties_and_bias_are_added_to_the_logits():
    sampler = Sampler(
        Options(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={0: 1.5}), {}
    )
    assert sampler.edits
    for token in (2, 2, 3):
        sampler.add(token)
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0]])
    assert sampler.edited([2, 2, 3], logits).tolist() == [[2.5, 1.0, 0.0, 0.25]]
    assert logits.tolist() == [[1.0] * 4]
    assert not Sampler(Options(presence_penalty=0.5), {}).edits  # nothing to subtract yet


def test_models_repetition_penalty_counts_the_prompt():
    sampler = Sampler(Options(), {**GREEDY, "repetition_penalty": 2.0})
    assert sampler.edited([0, 1], torch.tensor([[4.0, -1.0, 3.0]])).tolist() == [[2.0, -2.0, 3.0]]


def test_rows_of_a_batch_are_drawn_each_by_its_own_parameters():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]] * 5))
    options = [
        Options(temperature=0), Options(temperature=1, seed=3), Options(temperature=1, top_p=0.7),
        Options(temperature=0, logit_bias={2: 9.0}), Options(temperature=0.1, seed=5),
    ]  # fmt: skip
    samplers = [Sampler(option, {}) for option in options]
    counts = [Counter() for _ in options]
    for _ in range(500):
        for count, token in zip(counts, draw(logits, samplers, lambda i: [])[0], strict=True):
            count[token] += 1
    assert counts[0] == {0: 500} and counts[3] == {2: 500}
    assert [counts[1][i] / 500 for i in range(3)] == pytest.approx([0.5, 0.3, 0.2], abs=0.07)
    assert set(counts[2]) == {0, 1} and counts[2][0] / 500 == pytest.approx(0.625, abs=0.07)
    share = 0.5**10 / (0.5**10 + 0.3**10 + 0.2**10)
    assert counts[4][0] / 500 == pytest.approx(share, abs=0.02)


def test_a_seeds_tokens_do_not_depend_on_the_batch():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))

    def tokens(count):
        samplers = [Sampler(Options(temperature=1, seed=7), {}) for _ in range(count)]
        return [draw(logits[:count], samplers, lambda i: [])[0][0] for _ in range(20)]

    assert tokens(1) == tokens(4)
    choices = [Sampler(Options(seed=7), {}, choice).random.random() for choice in range(3)]
    assert len(set(choices)) == 3


def test_log_probabilities_are_the_models_own():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]]))
    sampler = Sampler(Options(temperature=0, logit_bias={2: 9.0}, top_logprobs=2), {})
    tokens, logprobs = draw(logits, [sampler], lambda i: [])
    found = logprobs[0]
    assert tokens == [2] and found.token == 2
    assert found.logprob == pytest.approx(torch.tensor(0.2).log().item(), abs=1e-6)
    assert [token for token, _ in found.top] == [0, 1]


def test_models_own_sampling_is_the_default():
    config = {"temperature": 0.3, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.1}
    own = SimpleNamespace(do_sample=True, min_p=None, **config)
    assert defaults(own) == {**config, "min_p": None}
    greedy = defaults(SimpleNamespace(do_sample=False, min_p=0.5, **config))
    assert (greedy["temperature"], greedy["top_k"], greedy["min_p"]) == (0.7, 0, None)
    assert greedy["repetition_penalty"] == 1.1  # transformers applies it to greedy decoding too
    assert Sampler(Options(), defaults(own)).temperature == 0.3
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
    sampler = Sampler(Options(temperature=1), {"top_k": 2})
    assert {draw(logits, [sampler], lambda i: [])[0][0] for _ in range(50)} == {0, 1}
