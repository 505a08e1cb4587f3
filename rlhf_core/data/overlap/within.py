"""Compares the two splits of a data set while it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_core.data.overlap.heldout import Comparison, HeldoutPrompts, Overlap

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
            self._file = pa.ipc.new_stream(str(self._path), train.schema)
        self._file.write_batch(train)

    def result(self) -> Overlap:
        """The overlap of all rows that were added."""
        import numpy as np
        import pyarrow as pa

        self._heldout.finish()
        comparison = Comparison(self._heldout)
        if self._file is not None:
            self._file.close()
            with pa.OSFile(str(self._path)) as stream, pa.ipc.open_stream(stream) as batches:
                for batch in batches:
                    rows = (batch.column(name).to_pylist() for name in _COLUMNS)
                    numbers, whole, grams = rows
                    hashes = [np.frombuffer(found, np.uint64) for found in grams]
                    comparison.add(numbers, whole, hashes)
        return comparison.result()
