"""Where a batch has its tokens, found on the host; and tokens put into rows and taken out again."""

import pytest
import torch

from rlhf_core.nn.padding import TokenIndex, batch_on, mark_from, put, rows_on, take

CPU = torch.device("cpu")


def test_a_batch_by_hand():
    batch = mark_from([[5, 6, 7], [8], [9, 4]], [2, 1, 1], CPU)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 0, 0], [9, 4, 0]]
    assert batch.mask.int().tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch.loss_mask.int().tolist() == [[0, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert batch.index.real.tolist() == [0, 1, 2, 3, 6, 7]
    assert batch.index.loss.tolist() == [2, 7]
    assert batch.input_ids.flatten()[batch.index.loss].tolist() == [7, 4]


def test_rows_without_a_loss_have_no_index_of_it():
    input_ids, mask, index = rows_on(CPU, [[5, 6], [7]])
    assert input_ids.tolist() == [[5, 6], [7, 0]] and mask.sum() == 3
    assert index.real.tolist() == [0, 1, 2] and index.loss is None


def test_a_loss_on_the_first_token_is_refused_on_the_host():
    ids, mask = torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="column 0"):
        batch_on(CPU, ids, mask, mask)
    with pytest.raises(ValueError, match="column 0"):
        mark_from([[5, 6]], [0], CPU)


def test_an_index_of_nothing_takes_and_puts_nothing():
    index = TokenIndex.of(torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.bool))
    rows = torch.ones(2, 3, 4, requires_grad=True)
    taken = take(rows, index.loss)
    assert taken.shape == (0, 4)
    (put(taken, index.loss, 2, 3).sum() + 0 * rows.sum()).backward()
    assert not rows.grad.any()


def test_gradients_go_where_the_tokens_came_from():
    rows = torch.arange(12.0).view(2, 3, 2).requires_grad_()
    indices = torch.tensor([1, 3, 5])
    taken = take(rows, indices)
    assert taken.tolist() == [[2, 3], [6, 7], [10, 11]]
    moved = put(taken * 2, torch.tensor([0, 2, 3]), 2, 2)
    assert moved.tolist() == [[[4, 6], [0, 0]], [[12, 14], [20, 22]]]
    (moved * torch.tensor([[[1.0], [7]], [[10], [100]]])).sum().backward()
    assert rows.grad[..., 0].tolist() == [[0, 2, 0], [20, 0, 200]]
