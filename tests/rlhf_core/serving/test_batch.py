"""Rows that join and leave a running batch; the oracle is transformers' generate on each alone."""

from __future__ import annotations

import copy
import logging
import random

import pytest

pytestmark = pytest.mark.slow


def replies(batch, prompts, lengths, seed):
    """Greedy replies of rows that join at random times, at most six at a time."""
    chance, found, rows, waiting = random.Random(seed), {}, [], list(range(len(prompts)))

    def advance(start, logits):
        for row, token in zip(rows[start:], logits.argmax(dim=1).tolist(), strict=True):
            found.setdefault(row, []).append(token)
        gone = [i for i, row in enumerate(rows) if len(found[row]) >= lengths[row]]
        if gone:
            rows[:] = [rows[i] for i in batch.leave(gone)]

    while waiting or rows:
        new = waiting[: chance.choice([0, 0, 1, 3])] if len(rows) < 6 else []
        if new:
            waiting, before = waiting[len(new) :], len(rows)
            rows += new
            advance(before, batch.join([prompts[row] for row in new]))
        if rows:
            advance(0, batch.step([found[row][-1] for row in rows]))
    return [found[row] for row in range(len(prompts))]


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_rows_get_the_replies_that_they_get_alone(architecture, tmp_path, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM

    from rlhf_core.serving import batch as module
    from tests.rlhf_core.tiny_models import wide_copy

    folder = wide_copy(architecture, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    chance = random.Random(0)
    prompts = [[chance.randrange(500) for _ in range(chance.randint(1, 30))] for _ in range(9)]
    lengths = [chance.randint(1, 25) for _ in prompts]
    alone = []
    for prompt, length in zip(prompts, lengths, strict=True):
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        alone.append(output[0, len(prompt) :].tolist())
    monkeypatch.setattr(module, "AHEAD", 7)  # the buffers are made anew again and again
    if architecture == "llama":  # bf16 rounds more, which is no fault
        assert module.Batch(copy.deepcopy(model).bfloat16()).joins
    batch = module.Batch(model)
    assert batch.joins
    with module.decoding(batch):
        assert replies(batch, prompts, lengths, seed=1) == alone
        assert batch.lengths == []
        assert replies(batch, prompts, lengths, seed=2) == alone


def test_rows_of_a_model_with_a_window_do_not_join(caplog):
    from transformers import AutoModelForCausalLM, MistralConfig

    from rlhf_core.serving.batch import Batch

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 99}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    model = AutoModelForCausalLM.from_config(MistralConfig(**sizes, **heads, sliding_window=8))
    with caplog.at_level(logging.WARNING):
        batch = Batch(model.eval())
    assert not batch.joins and "one after another" in caplog.text and "window" in caplog.text
