"""A seeded shuffle of any number of rows in bounded memory.

Every row has a random 64-bit priority; the shuffled order is the order of the priorities. Rows are
sorted in memory as long as they fit. Otherwise they are spread over files by the first bits of the
priority, and each file, or a few small ones together, is sorted on its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

BUCKETS = 256
MEMORY = 24 * 2**20  # bytes of rows in memory
SORTED = 4 * 2**20  # bytes of small files that are sorted together: each call of Arrow has its cost
PART_ROWS = 1000


class Shuffle:
    """Takes record batches and yields the same rows in the order of the column `key` (uint64).

    Args:
        folder: for temporary files.
        memory: bytes of rows that are kept in memory.
    """

    def __init__(self, folder: Path, key: str, memory: int = MEMORY) -> None:
        self._folder, self._key, self._memory = folder, key, memory
        self._held: list[Any] = []
        self._bytes = 0
        self._files: dict[int, Any] = {}

    def add(self, batch: Any) -> None:
        """Add the rows of a record batch."""
        if not batch.num_rows:
            return
        self._held.append(batch)
        self._bytes += batch.nbytes
        if self._bytes > self._memory:
            self._spill()

    def _sorted(self, batches: list[Any]) -> Any:
        import pyarrow as pa
        import pyarrow.compute

        rows = pa.concat_batches(batches)
        batches.clear()  # frees the parts before the sorted copy is made
        order = pa.compute.sort_indices(rows, sort_keys=[(self._key, "ascending")])
        return rows.take(order)

    def _spill(self) -> None:
        """Write the rows in memory to the files of their buckets."""
        import numpy as np
        import pyarrow as pa

        if not self._held:
            return
        rows = self._sorted(self._held)
        self._held, self._bytes = [], 0
        bucket = np.from_dlpack(rows.column(self._key)) // np.uint64(2**64 // BUCKETS)
        starts = np.searchsorted(bucket, np.arange(BUCKETS + 1, dtype=np.uint64))
        for number in range(BUCKETS):
            start, end = int(starts[number]), int(starts[number + 1])
            if start == end:
                continue
            if number not in self._files:
                self._files[number] = pa.ipc.new_stream(str(self._path(number)), rows.schema)
            self._files[number].write_batch(rows.slice(start, end - start))

    def __iter__(self) -> Iterator[Any]:
        """The shuffled rows in batches of at most PART_ROWS; no rows can be added afterwards."""
        import pyarrow as pa

        if not self._files:
            if self._held:
                yield from _parts(self._sorted(self._held))
            self._held = []
            return
        self._spill()
        for file in self._files.values():
            file.close()
        batches: list[Any] = []
        for number in sorted(self._files):
            path = self._path(number)
            with pa.OSFile(str(path)) as stream, pa.ipc.open_stream(stream) as reader:
                batches += reader
            path.unlink()
            if sum(batch.nbytes for batch in batches) > SORTED:
                yield from _parts(self._sorted(batches))
        if batches:
            yield from _parts(self._sorted(batches))

    def _path(self, bucket: int) -> Path:
        return self._folder / f"bucket-{bucket:03d}.arrow"


def _parts(rows: Any) -> Iterator[Any]:
    for start in range(0, rows.num_rows, PART_ROWS):
        yield rows.slice(start, PART_ROWS)
