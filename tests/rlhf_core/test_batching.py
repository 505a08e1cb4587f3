"""Order, micro-batches, padding and learning rates."""

import itertools

import numpy as np
import pytest
import torch

from rlhf_core.batching import (
    batch_rows,
    derive_seed,
    learning_rate_scale,
    pad_right,
    split_batch,
    steps_in,
)


def test_an_epoch_visits_every_row_once():
    seen = list(itertools.chain.from_iterable(batch_rows(12, 4, s, seed=3) for s in range(3)))
    assert sorted(seen) == list(range(12))


def test_epochs_differ_and_repeat_with_the_seed():
    first = [batch_rows(12, 4, s, seed=3) for s in range(3)]
    second = [batch_rows(12, 4, s, seed=3) for s in range(3, 6)]
    assert first != second
    assert first == [batch_rows(12, 4, s, seed=3) for s in range(3)]
    assert first != [batch_rows(12, 4, s, seed=4) for s in range(3)]


def test_a_batch_larger_than_the_data_goes_round():
    rows = batch_rows(3, 8, 0, seed=0)
    assert len(rows) == 8
    assert set(rows) == {0, 1, 2}


@pytest.mark.parametrize(
    ("rows", "batch", "epochs", "limit", "steps"),
    [(512, 128, 1, None, 4), (513, 128, 2, None, 8), (3, 8, 2, None, 2), (512, 128, 3, 5, 5)],
)
def test_steps_in(rows, batch, epochs, limit, steps):
    assert steps_in(rows, batch, epochs, limit) == steps


@pytest.mark.parametrize("world_size", (1, 2, 4))
@pytest.mark.parametrize("micro", (1, 2, 3, 8))
def test_micro_batches_cover_the_batch_evenly(world_size, micro):
    lengths = np.random.default_rng(0).integers(1, 50, size=24).tolist()
    parts = [split_batch(lengths, r, world_size, micro) for r in range(world_size)]
    flat = sorted(p for rank in parts for batch in rank for p in batch)
    assert flat == list(range(24))
    assert len({len(rank) for rank in parts}) == 1, "every rank takes part in every exchange"
    assert all(len(batch) <= micro for rank in parts for batch in rank)
    assert max(lengths[p] for p in parts[0][0]) == max(lengths), "the longest row comes first"


def test_pad_right_masks_by_length_not_by_value():
    ids, mask = pad_right([[0, 5], [0, 0, 0], []])
    assert ids.tolist() == [[0, 5, 0], [0, 0, 0], [0, 0, 0]]
    assert mask.tolist() == [[True, True, False], [True, True, True], [False, False, False]]
    assert mask.dtype == torch.bool


def test_learning_rate_by_hand():
    def scales(schedule):
        return [learning_rate_scale(s, 10, 0.2, schedule) for s in range(10)]

    np.testing.assert_allclose(scales("constant"), [1 / 3, 2 / 3] + [1.0] * 8)
    np.testing.assert_allclose(scales("linear"), [1 / 3, 2 / 3] + [1 - i / 8 for i in range(8)])
    cosine = [0.5 * (1 + np.cos(np.pi * i / 8)) for i in range(8)]
    np.testing.assert_allclose(scales("cosine"), [1 / 3, 2 / 3, *cosine])


def test_derive_seed_tells_its_arguments_apart():
    seeds = {derive_seed(a, b) for a in range(20) for b in range(20)}
    assert len(seeds) == 400
    assert derive_seed(1, 2) == derive_seed(1, 2)
