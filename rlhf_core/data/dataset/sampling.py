"""How an epoch is drawn from the rows of a mixture, and the order of a curriculum.

The sources of a mixture have N_i rows and parts c_i: weights, or rows. An epoch takes floor(t c_i)
rows of each, with the largest t that the stopping strategy allows; so the parts always hold. The
strategies are those of datasets.interleave_datasets (two of them in effect the under- and
oversampling of its documentation):

    first_exhausted                     no row twice:                   t c_i <= N_i
    all_exhausted                       no row more than R times:       t c_i <= R N_i,
                                        and no longer than it takes to use every row once:
                                        some t c_i <= N_i
    all_exhausted_without_replacement   each row once: N_i rows of each, in the proportions c_i as
                                        long as there are rows

Rows as parts are also bounds: t <= 1. An epoch uses the rows of a source equally often, give or
take one, and so do all epochs together: of a source that is larger than its part each epoch sees
other rows, until all were used (`_Rounds`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np

from rlhf_core.jobs.sources import EpochSettings, Share
from rlhf_core.system.seeds import derive_seed


@dataclass(frozen=True)
class Plan:
    """What a mixture's epochs are drawn by: the parts of its sources by their names."""

    shares: Mapping[str, Share]
    settings: EpochSettings

    def counts(self, available: Sequence[int]) -> list[int]:
        """Rows of each source in an epoch, at least 1.

        Args:
            available: rows that each source has, at least 1.
        """
        weighted = any(share.weight is not None for share in self.shares.values())
        parts = self._parts(available)
        rule = self.settings.stopping_strategy
        if rule == "all_exhausted_without_replacement":
            most = [n if weighted else int(c) for n, c in zip(available, parts, strict=True)]
            return [min(n, count) for n, count in zip(available, most, strict=True)]
        passes = self.settings.max_repeats if rule == "all_exhausted" else 1
        once = [n / c for n, c in zip(available, parts, strict=True)]  # t that uses each row once
        longest = min(passes * min(once), max(once) if weighted else Fraction(1))
        return [max(1, int(longest * c)) for c in parts]

    def _parts(self, available: Sequence[int]) -> list[Fraction]:
        return [
            Fraction(str(share.weight or share.rows or n))  # 0.1 is a tenth
            for share, n in zip(self.shares.values(), available, strict=True)
        ]

    def sampling(self, rows: Sequence[np.ndarray], order_by: np.ndarray | None = None) -> Sampling:
        """The plan for the rows that there are; see `Sampling`."""
        available = [len(numbers) for numbers in rows]
        rates = tuple(map(float, self._parts(available)))
        return Sampling(tuple(rows), tuple(self.counts(available)), rates, order_by)

    def describe(self, available: Sequence[int]) -> str:
        """What an epoch has of each source, in a sentence."""
        counts = self.counts(available)
        total = sum(counts)
        parts = [
            f"{name} {count:,} of {n:,} ({count / total:.1%}; each {count / n:.3g} times)"
            for name, count, n in zip(self.shares, counts, available, strict=True)
        ]
        return f"an epoch of the mixture takes {total:,}: {', '.join(parts)}"


@dataclass(frozen=True, eq=False)
class Sampling:
    """Draws epochs: a function of (seed, number of the epoch) alone.

    Attributes:
        rows: row numbers of each source.
        counts: rows of each source in an epoch.
        rates: in which proportions the sources follow each other while they last.
        order_by: (N,) a number for each row of the data set; an epoch is in ascending order. None:
            the order is random.
    """

    rows: tuple[np.ndarray, ...]
    counts: tuple[int, ...]
    rates: tuple[float, ...]
    order_by: np.ndarray | None = None
    _rounds: dict[tuple[int, int], _Rounds] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        """Rows in an epoch."""
        return sum(self.counts)

    def epoch(self, number: int, seed: int, most: int | None = None) -> np.ndarray:
        """Row numbers of an epoch (from 0), in order.

        The k-th row of a source is drawn at a random place between k and k + 1 over its rate, so
        that any stretch of the epoch has the parts of the whole.

        Args:
            most: rows that are used; further ones are left out before the epoch is ordered, so that
                a curriculum does not lose its end. None: all.
        """
        drawn, places = [], []
        for source, count in enumerate(self.counts):
            drawn.append(self._draw(source, number, seed))
            jitter = np.random.default_rng(derive_seed(seed, source, number, 0)).random(count)
            places.append((np.arange(count) + jitter) / self.rates[source])
        order = np.concatenate(drawn)[np.argsort(np.concatenate(places), kind="stable")][:most]
        if self.order_by is not None:
            order = order[np.argsort(self.order_by[order], kind="stable")]
        return order

    def _draw(self, source: int, number: int, seed: int) -> np.ndarray:
        """Row numbers of a source for an epoch: all its rows as often as they go in, and others."""
        rows = self.rows[source]
        whole, part = divmod(self.counts[source], len(rows))
        rounds = self._rounds.setdefault(
            (source, seed), _Rounds(len(rows), part, derive_seed(seed, source))
        )
        drawn = [_shuffled(len(rows), seed, source, number, i + 1) for i in range(whole)]
        return rows[np.concatenate([*drawn, rounds.window(number)])]

    def halved(self) -> Sampling:
        """The same for a data set in which each row became two: rows 2 i and 2 i + 1."""
        return replace(
            self,
            rows=tuple(np.stack([2 * r, 2 * r + 1], axis=1).ravel() for r in self.rows),
            counts=tuple(2 * count for count in self.counts),
            order_by=None if self.order_by is None else np.repeat(self.order_by, 2),
        )


class _Rounds:
    """Windows of `part` items, one after another, from rounds through range(size), each in a random
    order of its own. No window has an item twice, also where it begins in one round and ends in the
    next: the next one then begins with items that the window does not have yet."""

    def __init__(self, size: int, part: int, seed: int) -> None:
        self._size, self._part, self._seed = size, part, seed
        self._number, self._order = 0, _shuffled(size, seed, 0)

    def window(self, number: int) -> np.ndarray:
        """The items of a window (from 0)."""
        if not self._part:
            return np.zeros(0, dtype=np.int64)
        first, start = divmod(number * self._part, self._size)
        begin = self._round(first)[start : start + self._part]
        left = self._part - len(begin)
        return np.concatenate([begin, self._round(first + 1)[:left]]) if left else begin

    def _round(self, number: int) -> np.ndarray:
        """The order of a round. It follows from the one before, so they are made in turn."""
        if number < self._number:
            self._number, self._order = 0, _shuffled(self._size, self._seed, 0)
        while self._number < number:
            self._number += 1
            order = _shuffled(self._size, self._seed, self._number)
            taken = self._number * self._size % self._part  # by the window that goes on here
            if taken:
                last = self._order[self._size - taken :]
                head = order[~np.isin(order, last)][: self._part - taken]
                order = np.concatenate([head, order[~np.isin(order, head)]])
            self._order = order
        return self._order


def _shuffled(size: int, *seed: int) -> np.ndarray:
    return np.random.default_rng(derive_seed(*seed)).permutation(size)
