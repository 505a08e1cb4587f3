"""What people said on the page, kept in the store and read as a data set.

A verdict is a record of its own, <noun>/<time>-<random>.json, which never changes, so that pages on
several machines write beside each other. Their names sort by time: the verdicts up to one of them
are the same set whoever reads it later, and a run that has begun does not see what comes after.

No torch in here: the orchestrator asks for the fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rlhf_core.data.rows.row import RawRow
from rlhf_core.errors import DataError
from rlhf_core.store import Store
from rlhf_core.store.parallel import REQUESTS_AT_ONCE, in_parallel


@dataclass(frozen=True)
class Candidate:
    """A reply that a person saw.

    Attributes:
        model: what the page calls the model. digest: its artifact.
        score: the reward model's; None: there was none.
    """

    text: str
    model: str
    digest: str
    score: float | None = None

    def seen(self) -> dict[str, Any]:
        """What a record keeps of it beside the text."""
        return {"name": self.model, "digest": self.digest, "score": self.score}


@dataclass(frozen=True)
class Verdicts:
    """One kind of them.

    Attributes:
        source: name of the data set that all of a store's are.
        noun: for people, and the folder of the records.
        columns: of the rows that they are.
        how: what makes one.
    """

    source: str
    noun: str
    columns: tuple[str, ...]
    how: str

    def save(self, store: Store, record: Mapping[str, Any], details: Mapping[str, Any]) -> str:
        """Write one with the time; the path of its record.

        Raises:
            StoreError: the store cannot be written to.
        """
        now = datetime.now(UTC)
        path = f"{self.noun}/{now:%Y%m%dT%H%M%S.%f}Z-{uuid.uuid4().hex[:8]}.json"
        whole = {**record, "time": now.isoformat(timespec="seconds"), **details}
        store.write_record(path, whole, create=True)
        return path

    def count(self, store: Store) -> int:
        """How many there are."""
        return len(store.list_records(f"{self.noun}/"))

    def rows(self, store: Store, fingerprint: str = "") -> Iterator[RawRow]:
        """All as rows, oldest first.

        Args:
            fingerprint: as `fingerprint` gave it: only those that it covers. Empty: all.

        Raises:
            DataError: there are none, or they are no longer those of the fingerprint.
        """
        records = self._read(store, fingerprint)
        if fingerprint and self._identity(records) != fingerprint:
            raise DataError(
                f"The {self.noun} in {store.url} are no longer those that this run began with "
                "(some were deleted or changed); start the run again to use them as they are now."
            )
        for number, (_, record) in enumerate(records, 1):
            row = {name: record[name] for name in self.columns if name in record}
            yield RawRow(self.source, number, row)

    def fingerprint(self, store: Store) -> str:
        """Identity of all that are in a store; a new one changes it.

        Raises:
            DataError: there are none.
        """
        return self._identity(self._read(store, ""))

    def _read(self, store: Store, fingerprint: str) -> list[tuple[str, dict[str, Any]]]:
        folder, last = f"{self.noun}/", fingerprint.rpartition("@")[2]
        paths = [p for p in sorted(store.list_records(folder)) if not last or p <= folder + last]
        records = in_parallel(store.read_record, paths, REQUESTS_AT_ONCE)
        found = [(p, r) for p, r in zip(paths, records, strict=True) if r is not None]
        if not found:
            raise DataError(
                f"{self.source}: there are no {self.noun} in {store.url}; {self.how} with `rlhf "
                "playground` (and the same --store), or name another source."
            )
        return found

    def _identity(self, records: list[tuple[str, dict[str, Any]]]) -> str:
        """<noun>:<sha256 of names and rows>@<name of the newest>."""
        total = hashlib.sha256()
        for path, record in records:
            row = json.dumps([record.get(name) for name in self.columns], sort_keys=True)
            total.update(f"{path}\0{row}\n".encode("utf-8", "surrogatepass"))
        newest = records[-1][0].removeprefix(f"{self.noun}/")
        return f"{self.noun}:{total.hexdigest()[:32]}@{newest}"
