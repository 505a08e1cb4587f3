"""Two replies to one prompt in one row: the numbers of rows of their own."""

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from rlhf_core.models.loading import new_scalar_model
from rlhf_core.nn import modules
from rlhf_core.nn.modules import last_real
from rlhf_core.nn.shared_prompt import (
    LONGEST,
    block_mask,
    collate_shared,
    ends_of,
    split_rows,
    takes_block_masks,
)
from rlhf_core.training.preference import collate_pairs
from tests.rlhf_core.nn.test_response_logprobs import _DECODER
from tests.rlhf_core.tiny_models import copy_of

CPU = torch.device("cpu")
ROWS = [
    {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [10, 11, 12, 13]},
    {"prompt_ids": [20], "chosen_ids": [21, 22, 23], "rejected_ids": [24]},
]


def test_a_row_by_hand():
    ids, positions, segments = collate_shared(ROWS, CPU)
    assert ids[1].tolist() == [20, 21, 22, 23, 24, 0, 0, 0, 0]
    assert positions[1].tolist() == [0, 1, 2, 3, 1, 0, 0, 0, 0]
    assert segments[1].tolist() == [0, 1, 1, 1, 2, -1, -1, -1, -1]
    assert ends_of(segments, 1).tolist() == [4, 3]
    assert ends_of(segments, 2).tolist() == [8, 4]
    sees = block_mask(segments)[1, 0]
    assert sees[4].tolist() == [True, False, False, False, True] + [False] * 4
    assert sees[3].tolist() == [True, True, True, True] + [False] * 5
    assert sees[6].any(), "a row of nothing would be not a number"


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "opt"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_scores_and_gradients_are_those_of_rows_of_their_own(tmp_path, architecture, pooling):
    model = new_scalar_model(copy_of(architecture, tmp_path / "model"), seed=1)
    model.pooling = pooling
    assert takes_block_masks(model.backbone)

    def found(*batch):
        model.zero_grad()
        scores = model(*batch[:2], segments=batch[2] if batch[2:] else None)
        (scores * torch.tensor([1.0, -2.0, 3.0, 0.5])).sum().backward()
        return scores, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    shared, gradients = found(*collate_shared(ROWS, CPU))
    ids, mask, _ = collate_pairs(ROWS, CPU)
    assert last_real(mask).tolist() == [4, 3, 6, 1]
    apart, want = found(ids, mask)
    torch.testing.assert_close(shared, apart, rtol=1e-4, atol=1e-5)
    for name, gradient in want.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-4, msg=name)


def test_models_that_take_no_such_mask_are_found_out(tmp_path, caplog):
    model = new_scalar_model(copy_of("bloom", tmp_path / "model"), seed=1)
    assert not takes_block_masks(model.backbone)
    assert "BloomModel: pairs that share a row" in caplog.text


def test_rows_of_their_own_by_hand():
    ids, _, segments = collate_shared(ROWS, CPU)
    own, mask = split_rows(ids, segments)
    rows = [row[real].tolist() for row, real in zip(own, mask, strict=True)]
    assert rows == [[5, 6, 7, 8, 9], [20, 21, 22, 23], [5, 6, 7, 10, 11, 12, 13], [20, 24]]
    assert not (mask[:, 1:] > mask[:, :-1]).any(), "padding is on the right"


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_shared_rows_that_fail_in_training_are_scored_as_rows_of_their_own(
    tmp_path, pooling, monkeypatch, caplog
):
    model = new_scalar_model(copy_of("llama", tmp_path / "model"), seed=1)
    model.pooling = pooling
    ids, positions, segments = collate_shared(ROWS, CPU)
    want = model(ids, positions, segments=segments)

    def refuse(*given):
        raise RuntimeError("no kernel for this mask")

    monkeypatch.setattr(modules, "block_mask", refuse)
    found = model(ids, positions, segments=segments)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    assert "no kernel for this mask" in caplog.text
    assert not takes_block_masks(model.backbone)


def test_a_window_shorter_than_a_shared_row_is_not_replaced_by_the_mask():
    """The trial's rows are shorter than the window, so that it could not see it."""
    for window, taken in ((200, False), (LONGEST, True)):
        config = MistralConfig(**_DECODER | {"max_position_embeddings": 256}, sliding_window=window)
        assert takes_block_masks(MistralForCausalLM(config).eval().base_model) is taken
