"""Epochs of mixtures: how many rows of each source, which ones, and in which order."""

import itertools
from collections import Counter

import numpy as np
import pytest

from rlhf_core.data.dataset.sampling import Plan, Sampling
from rlhf_core.jobs.sources import EpochSettings, Share

FIRST, ALL, ONCE = "first_exhausted", "all_exhausted", "all_exhausted_without_replacement"


def plan(*parts, rule=ALL, repeats=4, kind="weight"):
    shares = {f"s{i}": Share(**({kind: part} if part else {})) for i, part in enumerate(parts)}
    return Plan(shares, EpochSettings(stopping_strategy=rule, max_repeats=repeats))


@pytest.mark.parametrize(
    ("parts", "available", "rule", "repeats", "counts"),
    [
        # weights: the epoch ends where s0 (10 rows, half of it) would be used a second time
        ((1, 1), (10, 1000), FIRST, 4, [10, 10]),
        ((3, 1), (9, 1000), FIRST, 4, [9, 3]),
        # where every row of both was used once: s0 three times
        ((1, 1), (100, 300), ALL, 4, [300, 300]),
        # where s0 was used four times, or as often as max_repeats says
        ((1, 1), (10, 1000), ALL, 4, [40, 40]),
        ((1, 1), (10, 1000), ALL, 1, [10, 10]),
        ((0.1, 0.9), (10, 30), ALL, 4, [10, 90]),
        ((1, 1), (10, 1000), ONCE, 4, [10, 1000]),
        # a source with a tiny weight still gives a row
        ((1000, 1), (100, 100), FIRST, 4, [100, 1]),
        # no parts: every row once
        ((None, None), (7, 5), FIRST, 4, [7, 5]),
        ((None, None), (7, 5), ALL, 4, [7, 5]),
    ],
)
def test_rows_of_each_source_in_an_epoch(parts, available, rule, repeats, counts):
    assert plan(*parts, rule=rule, repeats=repeats).counts(available) == counts


@pytest.mark.parametrize(
    ("rows", "rule", "counts"),
    [
        ((50, 20), FIRST, [50, 20]),  # of 100 and 100: samples
        ((50, 200), FIRST, [25, 100]),  # s1 has half of what it should give, so all give half
        ((50, 200), ALL, [50, 200]),  # s1 twice
        ((50, 800), ALL, [25, 400]),  # four times at most
        ((50, 200), ONCE, [50, 100]),  # s1 is used up, s0 goes on
        ((50, None), ALL, [50, 100]),  # s1: all rows
    ],
)
def test_rows_in_place_of_weights(rows, rule, counts):
    assert plan(*rows, rule=rule, kind="rows").counts((100, 100)) == counts


def sampling(*sizes, rule=ALL, repeats=4, weights=None, order_by=None):
    ends = np.cumsum([0, *sizes])
    rows = [np.arange(a, b) for a, b in itertools.pairwise(ends)]
    parts = weights or [None] * len(sizes)
    return plan(*parts, rule=rule, repeats=repeats).sampling(rows, order_by)


def test_an_epoch_without_parts_has_every_row_once_in_an_order_of_its_own():
    both = sampling(7, 5)
    first, second = (both.epoch(number, 3).tolist() for number in (0, 1))
    assert sorted(first) == sorted(second) == list(range(12)) and first != second
    assert first == both.epoch(0, 3).tolist() != both.epoch(0, 4).tolist()


def test_a_larger_source_gives_other_rows_in_each_epoch_until_all_were_used():
    # 4 of 10 rows an epoch: epochs 0 to 4 have each row twice.
    both = sampling(4, 10, rule=FIRST, weights=[1, 1])
    assert both.counts == (4, 4)
    epochs = [both.epoch(number, 0) for number in range(5)]
    large = [[row for row in epoch if row >= 4] for epoch in epochs]
    assert len({*large[0], *large[1]}) == 8
    assert Counter(itertools.chain.from_iterable(large)) == dict.fromkeys(range(4, 14), 2)


def test_a_smaller_source_is_repeated_evenly():
    both = sampling(4, 10, weights=[1, 1])
    assert both.counts == (10, 10)  # 2.5 times
    seen = Counter(int(row) for number in range(2) for row in both.epoch(number, 0))
    assert seen == dict.fromkeys(range(4), 5) | dict.fromkeys(range(4, 14), 2)


@pytest.mark.parametrize("size", range(1, 9))
def test_rows_are_used_equally_often_in_each_epoch_and_in_all(size):
    for count in range(1, 20):
        one, other = (Sampling((np.arange(size),), (count,), (1.0,)) for _ in range(2))
        epochs = [one.epoch(number, 7).tolist() for number in range(12)]
        total: Counter[int] = Counter()
        for epoch in epochs:
            seen = Counter(epoch)
            assert {count // size, -(-count // size)} >= {seen[row] for row in range(size)}
            total += seen
            assert max(total.values()) - min(total[row] for row in range(size)) <= 1
        assert [other.epoch(n, 7).tolist() for n in (11, 3, 5)] == [epochs[n] for n in (11, 3, 5)]


def test_parts_hold_in_every_stretch_of_an_epoch():
    both = sampling(1000, 3000, rule=FIRST, weights=[1, 3])
    for start in range(0, 4000, 100):
        small = sum(both.epoch(0, 5)[start : start + 100] < 1000)
        assert 23 <= small <= 27, "25 of 100, give or take what the edges cut"


def test_a_source_that_is_used_up_leaves_the_others():
    both = sampling(100, 1000, rule=ONCE, weights=[1, 1])
    order = both.epoch(0, 1)
    assert sorted(order) == list(range(1100))
    assert 98 <= sum(order[:200] < 100) <= 100 and (order[202:] >= 100).all()


def test_a_curriculum_orders_an_epoch_and_leaves_equal_rows_in_random_order():
    difficulty = np.array([3.0, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0])
    one = Sampling((np.arange(7),), (7,), (1.0,), difficulty)
    first, second = one.epoch(0, 0).tolist(), one.epoch(1, 0).tolist()
    assert [difficulty[i] for i in first] == sorted(difficulty)
    assert first[5:] == second[5:] == [2, 0] and first != second
    mixed = sampling(3, 4, order_by=difficulty)
    assert [difficulty[i] for i in mixed.epoch(0, 0)] == sorted(difficulty)


def test_rows_that_a_curriculum_leaves_out_are_drawn_at_random():
    one = Sampling((np.arange(9),), (9,), (1.0,), np.arange(9.0))
    epochs = [one.epoch(number, 0, 8).tolist() for number in range(100)]
    assert all(epoch == sorted(set(epoch)) and len(epoch) == 8 for epoch in epochs)
    assert {*range(9)} == {row for epoch in epochs for row in {*range(9)} - {*epoch}}


def test_halves_of_a_row_are_drawn_like_the_row():
    halves = sampling(2, 4, rule=FIRST, weights=[1, 1]).halved()
    assert halves.counts == (4, 4)
    epoch = halves.epoch(0, 0)
    assert sorted(row for row in epoch if row < 4) == [0, 1, 2, 3]
    assert len({row for row in epoch if row >= 4}) == 4
