"""Feedback that people gave on the page, saved in the store and read as a data set.

Each vote or thumb is a record of its own, <folder>/n<number>.json, which never changes. Pages on
several machines can write at the same time: only one of them creates a number, the others take the
next. So the records up to a given one are the same set for every later reader, whatever the
writers' clocks say, and a run does not see feedback from after its start. Records of before there
were numbers, <time>-<random>.json, come first. Imports no torch, for the orchestrator.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from rlhf_core.data.rows.row import RawRow
from rlhf_core.errors import DataError
from rlhf_core.store import Store
from rlhf_core.store.parallel import REQUESTS_AT_ONCE, in_parallel

_NUMBER = re.compile(r"n([0-9]{10})\.json")


def _number(path: str) -> int:
    match = _NUMBER.fullmatch(path.rpartition("/")[2])
    return int(match[1]) if match else 0


VERDICT = "verdict"
"""Field of a record that is feedback but no row: the reason for which the data card counts it."""


@dataclass(frozen=True)
class Candidate:
    """A reply that a person gave feedback on.

    Attributes:
        model: its name on the page. digest: of its artifact.
        score: of the reward model; None: no score.
    """

    text: str
    model: str
    digest: str
    score: float | None = None

    def as_record(self) -> dict[str, Any]:
        """What a record stores about the reply besides its text."""
        return {"name": self.model, "digest": self.digest, "score": self.score}


@dataclass
class Attempt:
    """To write one record, once: whoever repeats it after an error, which may have come after the
    writing, finds what was written.

    Attributes:
        id: of the record; makes those of two writers differ.
        number: that was tried last; 0: none.
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    number: int = 0


@dataclass(frozen=True)
class FeedbackKind:
    """A kind of feedback, such as votes.

    Attributes:
        source: the data source that stands for all of it in the run's store.
        folder: of the records; also its name in messages.
        columns: of the rows.
        instruction: how people give it, for messages.
    """

    source: str
    folder: str
    columns: tuple[str, ...]
    instruction: str

    def save(
        self,
        store: Store,
        record: Mapping[str, Any],
        details: Mapping[str, Any],
        attempt: Attempt | None = None,
    ) -> str:
        """Write one record with the next number; returns its path.

        Args:
            record: the row's columns, and what else belongs to the kind.
            details: further fields, such as the run and the user.
            attempt: of the same record, if it may have been written already.

        Raises:
            StoreError: the store cannot be written to.
        """
        whole = {**record, "time": datetime.now(UTC).isoformat(timespec="seconds"), **details}
        attempt = attempt or Attempt()
        whole["id"] = attempt.id
        if not attempt.number:
            found = [_number(path) for path in store.list_records(f"{self.folder}/n")]
            attempt.number = max(found, default=0) + 1
        while True:
            path = f"{self.folder}/n{attempt.number:010}.json"
            if store.write_record(path, whole, create=True):
                return path
            if (store.read_record(path) or {}).get("id") == attempt.id:
                return path  # the store had written it before it failed
            attempt.number += 1

    def count(self, store: Store) -> int:
        """Number of records in the store."""
        return len(store.list_records(f"{self.folder}/"))

    def rows(self, store: Store, fingerprint: str = "") -> Iterator[RawRow]:
        """The records as rows, oldest first.

        Args:
            fingerprint: a result of `fingerprint`: read only the records that it covers. Empty:
                all.

        Raises:
            DataError: there are no records, or those of the fingerprint have changed.
        """
        records = self._read(store, fingerprint)
        if fingerprint and self._identity(records) != fingerprint:
            raise DataError(
                f"The {self.folder} in {store.url} are no longer those that this run started with "
                "(some were deleted or changed); start the run again to use the current ones."
            )
        for number, (_, record) in enumerate(records, 1):
            row = {name: record[name] for name in self.columns if name in record}
            yield RawRow(self.source, number, row, dropped=str(record.get(VERDICT) or ""))

    def fingerprint(self, store: Store) -> str:
        """The identity of all records in a store; every new record changes it.

        Raises:
            DataError: there are no records.
        """
        return self._identity(self._read(store, ""))

    def _read(self, store: Store, fingerprint: str) -> list[tuple[str, dict[str, Any]]]:
        """(path, record) up to the newest record of the fingerprint."""
        folder, last = f"{self.folder}/", fingerprint.rpartition("@")[2]
        paths = [p for p in sorted(store.list_records(folder)) if not last or p <= folder + last]
        records = in_parallel(store.read_record, paths, REQUESTS_AT_ONCE)
        found = [(p, r) for p, r in zip(paths, records, strict=True) if r is not None]
        if not found:
            raise DataError(
                f"{self.source}: there are no {self.folder} in {store.url}; {self.instruction} "
                "with `rlhf playground` (and the same --store), or name another source."
            )
        return found

    def _identity(self, records: list[tuple[str, dict[str, Any]]]) -> str:
        """<folder>:<sha256 of paths and rows>@<name of the newest record>."""
        total = hashlib.sha256()
        for path, record in records:
            row = json.dumps([record.get(name) for name in self.columns], sort_keys=True)
            total.update(f"{path}\0{row}\n".encode("utf-8", "surrogatepass"))
        newest = records[-1][0].removeprefix(f"{self.folder}/")
        return f"{self.folder}:{total.hexdigest()[:32]}@{newest}"
