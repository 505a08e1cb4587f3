"""Packing by hand and by count, and what models make of it."""

import numpy as np
import pytest
import torch

from rlhf_core.algorithms.pretrain import check_length
from rlhf_core.data.dataset.reading import Rows
from rlhf_core.data.dataset.writer import write_dataset
from rlhf_core.errors import ConfigError
from rlhf_core.nn.response_logprobs import response_logprobs
from rlhf_core.training.packing import (
    Packing,
    batch_sequences,
    collate,
    separates_documents,
    steps_per_epoch,
)
from tests.rlhf_core.models.test_models import tiny

E = 1  # end of text
CPU = torch.device("cpu")


def rows_of(folder, documents, start=True):
    """A data set of the documents; `start`: their first token is trained on."""
    rows = [
        {"input_ids": ids, "trainable": [start, *[True] * (len(ids) - 1)], "prompt": str(i),
         "row": i + 1}
        for i, ids in enumerate(documents)
    ]  # fmt: skip
    write_dataset(folder, "pretrain", {"train": rows}, {"source": "test"})
    return Rows(folder, "train", "pretrain")


def test_packing_by_hand(tmp_path):
    """The example of the module's docstring."""
    a, b, c, d, e, f = range(10, 16)
    packing = Packing(rows_of(tmp_path, [[a, b, E], [c, E], [d, e, f, E]]), E, 5)
    assert [p.ids for p in (packing[i] for i in range(3))] == [
        [E, a, b, E, c], [c, E, d, e, f], [f, E]
    ]  # fmt: skip
    assert [packing[i].positions for i in range(3)] == [[0, 1, 2, 0, 1], [0, 0, 1, 2, 3], [0, 1]]
    assert [packing[i].loss_mask for i in range(3)] == [[False, *[True] * 4]] * 2 + [[False, True]]
    assert len(packing) == 3 and packing.lengths() == [5, 5, 2]
    with pytest.raises(IndexError):
        packing[3]


def test_rows_with_a_start_of_their_own_get_no_other(tmp_path):
    """bos, or the last token of the piece before: neither has a loss of its own."""
    packing = Packing(rows_of(tmp_path, [[2, 7, E], [7, 8, 9]], start=False), E, 8)
    assert packing[0].ids == [2, 7, E, 7, 8, 9]
    assert packing[0].loss_mask == [False, True, True, False, True, True]
    assert packing[0].positions == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("length", [2, 3, 7, 64, 1000])
def test_every_token_has_one_loss_in_each_epoch(tmp_path, length):
    rng = np.random.default_rng(length)
    documents, token = [], 100
    for i in range(40):  # no token occurs twice; every third document has no end
        size = int(rng.integers(1, 30))
        documents.append([*range(token, token + size), *([E] if i % 3 else [])])
        token += size
    packing = Packing(rows_of(tmp_path, documents), E, length)
    steps = steps_per_epoch(len(packing), 4)
    for epoch in (0, 1):
        seen = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            for number in batch_sequences(len(packing), 4, step, seed=3):
                packed = packing[number]
                assert len(packed.ids) == packing.lengths()[number] <= length
                assert not packed.loss_mask[0]
                seen += [
                    t
                    for t, loss_mask in zip(packed.ids, packed.loss_mask, strict=True)
                    if loss_mask
                ]
        assert sorted(seen) == sorted(t for document in documents for t in document)
    first, second = (
        [batch_sequences(len(packing), 4, s + e * steps, 3) for s in range(steps)] for e in (0, 1)
    )
    assert first != second or len(packing) < 3, "each epoch has an order of its own"


def test_nothing_to_pack(tmp_path):
    packing = Packing(rows_of(tmp_path, []), E, 8)
    assert len(packing) == 0 and packing.lengths() == []


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_packed_documents_are_read_as_if_each_stood_alone(tmp_path, architecture, implementation):
    model = tiny(architecture).eval()
    model.set_attn_implementation(implementation)
    assert separates_documents(model)
    documents = [[5, 6, 7, E], [8, E], [9, 10, 11, 12, 13, E]]
    packing = Packing(rows_of(tmp_path, documents), E, 9)
    ids, mask, loss_mask, index, positions = collate([packing[0], packing[1]], CPU, separate=True)
    with torch.no_grad():
        packed = response_logprobs(model, ids, mask, positions, loss_mask, index=index)
        for document, places in ((documents[0], slice(1, 5)), (documents[1], slice(5, 7))):
            alone = torch.tensor([[E, *document]])
            wanted = torch.ones_like(alone).bool()
            wanted[:, 0] = False
            expected = response_logprobs(model, alone, torch.ones_like(alone), None, wanted)
            torch.testing.assert_close(packed[0, places], expected[0, 1:], atol=1e-5, rtol=1e-5)
    # The second sequence is shorter; what it is padded with has no log-probability.
    assert packed.shape == (2, 9) and not packed[1, len(packing[1].ids) :].any()


@pytest.mark.parametrize("architecture", ["opt", "bloom"])
def test_models_that_read_across_documents_are_found_out(tmp_path, architecture):
    model = tiny(architecture).eval()
    assert not separates_documents(model)
    packing = Packing(rows_of(tmp_path, [[5, 6, 7, E], [8, E]]), E, 9)
    ids, mask, loss_mask, index, positions = collate([packing[0]], CPU, separate=False)
    assert positions is None and bool(mask.all())
    with torch.no_grad():
        got = response_logprobs(model, ids, mask, positions, loss_mask, index=index)
        logits = model(input_ids=ids).logits.log_softmax(dim=-1)
    expected = logits[0, :-1].gather(1, ids[0, 1:, None]).squeeze(1)
    torch.testing.assert_close(got[0, 1:], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("architecture", "apart"), [("llama", True), ("opt", False)])
def test_documents_are_found_apart_in_half_precision(architecture, apart, dtype):
    # Rounding must not pass for another document's influence, nor hide it.
    assert separates_documents(tiny(architecture).to(dtype)) is apart


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sequences_longer_than_the_model_reads_are_refused(name):
    model = tiny(name)
    longest = model.config.max_position_embeddings
    check_length(model, longest)
    with pytest.raises(ConfigError, match=rf"model reads {longest:,} tokens at most"):
        check_length(model, longest + 1)
