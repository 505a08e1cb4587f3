"""Votes: which of two replies to the same conversation a person found better.

A vote is a record of its own, votes/<time>-<random>.json, which never changes, so that pages on
several machines write beside each other. Their names sort by time: the votes up to one of them are
the same set whoever reads it later, and a run that has begun does not see those that come after.

No torch in here: the orchestrator asks for the fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from rlhf_core.data.row import Message, RawRow
from rlhf_core.errors import DataError
from rlhf_core.store import Store
from rlhf_core.store.parallel import REQUESTS_AT_ONCE, in_parallel

SOURCE = "playground-votes"
"""`data.preference.source` for all votes of the run's store."""
FOLDER = "votes/"
ROW = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class Candidate:
    """One of the replies that a person saw.

    Attributes:
        model: what the page calls the model. digest: its artifact.
        score: the reward model's; None: there was none.
    """

    text: str
    model: str
    digest: str
    score: float | None = None


@dataclass(frozen=True)
class Vote:
    """One comparison.

    Attributes:
        prompt: the conversation before the replies; the last message is the user's.
        details: what else is kept of it (run, sampling, who).
    """

    prompt: Sequence[Message]
    chosen: Candidate
    rejected: Candidate
    details: dict[str, Any] = field(default_factory=dict)

    def problem(self) -> str:
        """Why nothing can be learned from it: "empty", "identical", or "" if it can."""
        if not self.chosen.text.strip() or not self.rejected.text.strip():
            return "empty"
        return "identical" if self.chosen.text.strip() == self.rejected.text.strip() else ""


def save_vote(store: Store, vote: Vote) -> str:
    """Write a vote; the path of its record.

    Raises:
        DataError: a reply is empty, or both are the same.
        StoreError: the store cannot be written to.
    """
    if problem := vote.problem():
        raise DataError(f"The vote was not saved: the replies are {problem}, so they are no pair.")
    now = datetime.now(UTC)
    path = f"{FOLDER}{now:%Y%m%dT%H%M%S.%f}Z-{uuid.uuid4().hex[:8]}.json"
    record = {
        "prompt": [dict(message) for message in vote.prompt],
        "chosen": vote.chosen.text,
        "rejected": vote.rejected.text,
        "models": {
            side: {"name": c.model, "digest": c.digest, "score": c.score}
            for side, c in (("chosen", vote.chosen), ("rejected", vote.rejected))
        },
        "time": now.isoformat(timespec="seconds"),
        **vote.details,
    }
    store.write_record(path, record, create=True)
    return path


def count_votes(store: Store) -> int:
    """How many there are."""
    return len(store.list_records(FOLDER))


def vote_rows(store: Store, fingerprint: str = "") -> Iterator[RawRow]:
    """The votes as rows of format `preference`, oldest first.

    Args:
        fingerprint: as `votes_fingerprint` gave it: only the votes that it covers. Empty: all.

    Raises:
        DataError: there are none, or they are no longer those of the fingerprint.
    """
    records = _read(store, fingerprint)
    if fingerprint and _identity(records) != fingerprint:
        raise DataError(
            f"The votes in {store.url} are no longer those that this run began with (some were "
            "deleted or changed); start the run again to use them as they are now."
        )
    for number, (_, record) in enumerate(records, 1):
        yield RawRow(SOURCE, number, {name: record[name] for name in ROW if name in record})


def votes_fingerprint(store: Store) -> str:
    """Identity of all votes in a store; a new one changes it.

    Raises:
        DataError: there are none.
    """
    return _identity(_read(store, ""))


def _read(store: Store, fingerprint: str) -> list[tuple[str, dict[str, Any]]]:
    last = fingerprint.rpartition("@")[2]
    paths = [p for p in sorted(store.list_records(FOLDER)) if not last or p <= FOLDER + last]
    records = in_parallel(store.read_record, paths, REQUESTS_AT_ONCE)
    found = [(p, r) for p, r in zip(paths, records, strict=True) if r is not None]
    if not found:
        raise DataError(
            f"{SOURCE}: there are no votes in {store.url}; compare some replies with `rlhf "
            "playground` (and the same --store), or name another source."
        )
    return found


def _identity(records: list[tuple[str, dict[str, Any]]]) -> str:
    """votes:<sha256 of names and rows>@<name of the newest>."""
    total = hashlib.sha256()
    for path, record in records:
        row = json.dumps([record.get(name) for name in ROW], sort_keys=True)
        total.update(f"{path}\0{row}\n".encode("utf-8", "surrogatepass"))
    return f"votes:{total.hexdigest()[:32]}@{records[-1][0].removeprefix(FOLDER)}"
