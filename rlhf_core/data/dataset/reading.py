"""Reads a data set: memory-mapped, by index, without importing `datasets`."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhf_core.data.dataset.card import DataCard
from rlhf_core.data.dataset.carried import CARRIED
from rlhf_core.data.dataset.sampling import Sampling
from rlhf_core.data.dataset.schema import SPLITS
from rlhf_core.errors import DataError


class Rows:
    """One split of a data set.

    Args:
        folder: of a dataset artifact.
        split: train or heldout.
        purpose: the accepted purpose or purposes; empty: any.

    Raises:
        DataError: the folder is not a data set, or is one for another purpose.
    """

    def __init__(
        self, folder: Path, split: str, purpose: str | Sequence[str] | None = None
    ) -> None:
        import pyarrow as pa

        self.folder, self.split = Path(folder), split
        self.card = DataCard.load(self.folder)
        self.purpose = self.card.purpose
        wanted = [purpose] if isinstance(purpose, str) else list(purpose or ())
        if wanted and self.purpose not in wanted:
            raise DataError(
                f"The data set {self.folder} (from {self.card.source or 'unknown'}) is for "
                f"{self.purpose}; expected one for {' or '.join(wanted)}: prepare the data with "
                f"purpose {wanted[0]}."
            )
        if split not in SPLITS:
            raise DataError(f"There is no split {split!r}; there are {', '.join(SPLITS)}.")
        names = [f["name"] for f in self.card.files if f["name"].startswith(f"{split}-")]
        self._batches: list[Any] = []
        for name in names:
            try:
                reader = pa.ipc.open_file(pa.memory_map(str(self.folder / name)))
                self._batches += [reader.get_batch(i) for i in range(reader.num_record_batches)]
            except (OSError, pa.ArrowException) as error:
                raise DataError(
                    f"{self.folder / name} is not a complete Arrow file ({error}); fetch or "
                    "prepare the data set again."
                ) from error
        self._ends: list[int] = []
        for batch in self._batches:
            self._ends.append((self._ends[-1] if self._ends else 0) + batch.num_rows)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A row as plain Python values; prompts always have `answer` and `extra`, "" if empty."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        number = bisect.bisect_right(self._ends, index)
        batch = self._batches[number]
        at = index - (self._ends[number] - batch.num_rows)
        return self._with_carried(batch.slice(at, 1).to_pylist()[0])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._batches:
            yield from map(self._with_carried, batch.to_pylist())

    def _with_carried(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row; prompts get "" for the columns that their data set does not carry."""
        missing = dict.fromkeys(CARRIED["prompts"], "")
        return {**missing, **row} if self.purpose == "prompts" else row

    @property
    def batches(self) -> list[Any]:
        """All record batches, memory-mapped."""
        return self._batches

    @cached_property
    def sources(self) -> dict[str, Any]:
        """Row numbers, numpy int64, by the source of a mixture; empty for other data sets."""
        import numpy as np
        import pyarrow as pa
        import pyarrow.compute as pc

        if self.card.mixture is None:
            return {}
        names = [source.name for source in self.card.mixture.sources]
        parts = [pc.index_in(b.column("source"), pa.array(names)).to_numpy() for b in self._batches]
        number = np.concatenate([np.zeros(0, dtype=np.int32), *parts])
        return {name: np.flatnonzero(number == i) for i, name in enumerate(names)}

    @cached_property
    def levels(self) -> Any:
        """Each row's number in the column curriculum, numpy float64 (N,); None without one."""
        import numpy as np

        if not self._batches or "curriculum" not in self._batches[0].schema.names:
            return None
        return np.concatenate([b.column("curriculum").to_numpy() for b in self._batches])

    @cached_property
    def sampling(self) -> Sampling | None:
        """How an epoch is drawn from the rows; None: all of them in random order."""
        import numpy as np

        order_by = self.levels
        if self.card.mixture is not None:
            return self.card.mixture.plan.sampling(list(self.sources.values()), order_by)
        if order_by is None:
            return None
        return Sampling((np.arange(len(self)),), (len(self),), (1.0,), order_by)

    def take(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The rows at these indices, in that order."""
        return [self[int(index)] for index in indices]

    def lengths(self, column: str) -> Any:
        """Lengths of a list column's values, numpy int64 (N,).

        Raises:
            DataError: there is no such column of lists.
        """
        import numpy as np
        import pyarrow.compute as pc

        parts = [pc.list_value_length(values) for values in self._lists(column)]
        none = [np.zeros(0, dtype=np.int64)]
        return np.concatenate(
            none + [p.to_numpy(zero_copy_only=False).astype(np.int64) for p in parts]
        )

    def first_and_last(self, column: str) -> tuple[Any, Any]:
        """First and last element of each of a list column's values: numpy int64, (N,) each.

        No value may be empty.

        Raises:
            DataError: there is no such column of lists.
        """
        import numpy as np

        first, last = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        for values in self._lists(column):
            offsets, flat = values.offsets.to_numpy(), values.values  # of the batch's whole buffer
            first.append(flat.take(offsets[:-1]).to_numpy(zero_copy_only=False).astype(np.int64))
            last.append(flat.take(offsets[1:] - 1).to_numpy(zero_copy_only=False).astype(np.int64))
        return np.concatenate(first), np.concatenate(last)

    def _lists(self, column: str) -> list[Any]:
        import pyarrow as pa

        if not self._batches:
            return []
        kind = self._batches[0].schema
        if column not in kind.names or not pa.types.is_list(kind.field(column).type):
            lists = [field.name for field in kind if pa.types.is_list(field.type)]
            raise DataError(f"There is no list column {column!r}; there are {', '.join(lists)}.")
        return [batch.column(column) for batch in self._batches]
