"""Compares the two splits of a data set while it is written."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from rlhf_core.data.overlap.heldout import Comparison, HeldoutPrompts, Match, Overlap
from rlhf_core.data.parallel import ordered_map

_COLUMNS = ("row", "_whole", "_grams")


class SplitOverlap:
    """Takes the rows of both splits in any order, then compares them.

    Held-out prompts are in memory up to the bounds of heldout.py; training rows are in a file.

    Args:
        scratch: folder for the file. The caller removes it.
    """

    def __init__(self, scratch: Path) -> None:
        self._path = scratch / "overlap.arrow"
        self._heldout = HeldoutPrompts()
        self._file: Any = None
        self._batches = 0

    def add(self, heldout: Any, train: Any, texts: list[str]) -> None:
        """Add record batches with the columns row, _whole and _grams.

        Args:
            texts: the prompts of the held-out rows.
        """
        import numpy as np
        import pyarrow as pa

        columns = (heldout.column(name).to_pylist() for name in _COLUMNS[1:])
        for text, whole, grams in zip(texts, *columns, strict=True):
            self._heldout.add(text, whole, np.frombuffer(grams, np.uint64))
        train = train.select(list(_COLUMNS))
        if self._file is None:
            self._file = pa.ipc.new_file(str(self._path), train.schema)
        self._file.write_batch(train)
        self._batches += 1

    def result(self, workers: int | None = None) -> Overlap:
        """The overlap of all rows that were added.

        Args:
            workers: as for `ordered_map`.
        """
        self._heldout.finish()
        comparison = Comparison(self._heldout)
        if self._file is not None:
            self._file.close()
            find = functools.partial(_find, self._heldout, self._path)
            for compared, matches in ordered_map(find, range(self._batches), workers):
                comparison.merge(compared, matches)
        return comparison.result()


def _find(heldout: HeldoutPrompts, path: Path, batch: int) -> tuple[int, list[Match]]:
    """`HeldoutPrompts.matches` of one batch of the file."""
    import numpy as np
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        rows = pa.ipc.open_file(file).get_batch(batch)
        numbers, whole, grams = (rows.column(name).to_pylist() for name in _COLUMNS)
    return heldout.matches(numbers, whole, [np.frombuffer(found, np.uint64) for found in grams])
