"""Order, micro-batches, padding and learning rates."""

import itertools
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlhf_core.data.dataset.sampling import Sampling
from rlhf_core.nn.padding import pad_right
from rlhf_core.system.seeds import derive_seed
from rlhf_core.training.batching import (
    _cuts,
    batch_rows,
    epoch_order,
    learning_rate_scale,
    pass_cost,
    scoring_passes,
    split_batch,
    split_evenly,
    steps_in,
)

CPU = torch.device("cpu")


def rank_of(rank, size, device="cpu"):
    """What `split_batch` reads of a rank's group."""
    return SimpleNamespace(rank=rank, size=size, device=torch.device(device))


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


def test_order_of_an_epoch_is_computed_once():
    before = epoch_order.cache_info().misses
    steps = [batch_rows(1000, 10, step, seed=5) for step in range(100)]
    assert epoch_order.cache_info().misses == before + 1
    assert sorted(itertools.chain.from_iterable(steps)) == list(range(1000))


@pytest.mark.parametrize(("batch", "left_out"), [(4, {*range(6)}), (6, set())])
def test_whole_batches_of_a_curriculum_leave_out_random_rows(batch, left_out):
    easy = Sampling((np.arange(6),), (6,), (1.0,), np.arange(6.0))
    rows = SimpleNamespace(sampling=easy)
    epochs = [batch_rows(rows, batch, step, seed=0) for step in range(40)]
    assert all(epoch == sorted({*epoch}) and len(epoch) == batch for epoch in epochs)
    assert {row for epoch in epochs for row in {*range(6)} - {*epoch}} == left_out


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
    parts = [split_batch(lengths, rank_of(r, world_size), micro) for r in range(world_size)]
    flat = sorted(p for rank in parts for batch in rank for p in batch)
    assert flat == list(range(24))
    assert len({len(rank) for rank in parts}) == 1, "every rank takes part in every exchange"
    for batch in (b for rank in parts for b in rank):
        assert len(batch) * max(lengths[p] for p in batch) <= micro * max(lengths)
    assert max(lengths[p] for p in parts[0][0]) == max(lengths), "the longest row comes first"


def test_cuts_follow_the_device_of_the_rank(monkeypatch):
    # A pass of a GPU costs as much as 2048 tokens: one pass with padding is then the cheapest.
    lengths = [100, 100, 10, 10]
    for machine_has_a_gpu in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has=machine_has_a_gpu: has)
        assert split_batch(lengths, rank_of(0, 1, "cpu"), 4) == [[0, 1], [2, 3]]
        assert split_batch(lengths, rank_of(0, 1, "cuda"), 4) == [[0, 1, 2, 3]]


@pytest.mark.parametrize("padding", [1.0, 0.25])
def test_cuts_are_the_cheapest_of_all(padding):
    widths = sorted(np.random.default_rng(1).integers(1, 400, size=10).tolist(), reverse=True)

    def tokens(start, stop):
        real = sum(widths[start:stop])
        return real + padding * ((stop - start) * widths[start] - real)

    def cost(cuts):
        return sum(tokens(*cut) + pass_cost(CPU) for cut in cuts)

    def ways(start):  # every way to cut what is left, by brute force
        if start == len(widths):
            yield []
        for stop in range(start + 1, len(widths) + 1):
            if tokens(start, stop) <= 3 * widths[0]:
                yield from ([(start, stop), *rest] for rest in ways(stop))

    found = _cuts(widths, 3, pass_cost(CPU), padding)
    assert cost(found) == min(map(cost, ways(0)))
    assert [start for start, _ in found[1:]] == [stop for _, stop in found[:-1]]


def test_a_given_number_of_parts_is_even():
    lengths = [5, 9, 1, 7, 3, 8, 2, 6, 4, 10]
    ranks = [split_evenly(lengths, r, 2, 3) for r in range(2)]
    assert [[len(part) for part in rank] for rank in ranks] == [[1, 2, 2], [1, 2, 2]]
    assert sorted(p for rank in ranks for part in rank for p in part) == list(range(10))
    assert ranks[0][0] == [9], "the longest row comes first"


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


@pytest.mark.parametrize("rows", (0, 1, 3, 4, 9, 13))
@pytest.mark.parametrize("world_size", (1, 2, 4))
def test_ranks_score_every_row_once_in_as_many_passes_each(rows, world_size):
    lengths = np.random.default_rng(rows).integers(1, 50, size=rows).tolist()
    ranks = [scoring_passes(lengths, rank_of(r, world_size), 2) for r in range(world_size)]
    assert len({len(passes) for passes in ranks}) == 1
    counted = [row for passes in ranks for one in passes if one.counts for row in one.rows]
    assert sorted(counted) == list(range(rows))
    assert all(one.rows for passes in ranks for one in passes), "no pass is empty"


def test_time_to_plan_passes_is_linear_in_the_rows():
    def seconds(rows):
        widths = [10 + number % 500 for number in range(rows)]
        began = time.process_time()
        scoring_passes(widths, rank_of(0, 1), 8)
        return time.process_time() - began

    # A window that looks at all later rows would take 64 times as long.
    assert seconds(32_000) < 24 * max(seconds(4_000), 0.03)
