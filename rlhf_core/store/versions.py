"""The versions of a model's name, as its log of transitions tells them; see registry."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

from rlhf_core.errors import ArtifactCorrupt, ArtifactNotFound, ConfigError
from rlhf_core.store.parallel import REQUESTS_AT_ONCE, in_parallel
from rlhf_core.store.store import Store

State = Literal["candidate", "champion", "archived"]
LIVED = "promote", "rollback"
"""Actions that make a champion."""
_LOG = re.compile(r"models/[^/]+/log/([0-9]{8,})\.json")


@dataclass(frozen=True)
class Transition:
    """What happened to a version; time is ISO 8601, UTC."""

    number: int  # of the record; several that were taken over share one
    action: str  # candidate, promote, rollback, archive
    digest: str
    run: str = ""
    time: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Version:
    """A version of a model; the number is its place among those of its name, from 1."""

    number: int
    digest: str
    state: State
    run: str
    time: str
    reason: str = ""  # of its last transition


@dataclass(frozen=True)
class Model:
    """All versions of a name as they were at one moment."""

    name: str
    versions: tuple[Version, ...]
    history: tuple[Transition, ...]
    champions: tuple[str, ...]  # as a stack: rolling back takes the last one off
    archived: tuple[str, ...]  # in the order in which they became it

    @property
    def champion(self) -> Version | None:
        """The version that is published now."""
        return next((v for v in self.versions if v.state == "champion"), None)

    def version(self, digest: str) -> Version | None:
        """The version that an artifact is."""
        return next((v for v in self.versions if v.digest == digest), None)

    def find(self, wanted: str) -> Version:
        """A version by its number or by the start of its digest.

        Raises:
            ArtifactNotFound: no version answers to it.
            ConfigError: several do.
        """
        text = wanted.rpartition("/")[2].lower()
        for version in self.versions:
            if text.removeprefix("v") == str(version.number):
                return version
        found = [v for v in self.versions if len(text) >= 6 and v.digest.startswith(text)]
        if len(found) == 1:
            return found[0]
        shown = ", ".join(f"{v.number} ({v.digest[:12]}, {v.state})" for v in self.versions)
        if found:
            raise ConfigError(f"{wanted!r} is the start of {len(found)} versions of {self.name}: "
                              f"{shown}; give more digits, or the number.")  # fmt: skip
        raise ArtifactNotFound(
            f"{self.name} has no version {wanted!r}; needed is a number or at least 6 digits of a "
            f"digest. Versions: {shown}."
        )


@dataclass(frozen=True)
class End:
    """How far a name's log goes."""

    paths: list[str]
    last: dict[str, Any]  # the last record of the log
    late: list[str]  # publications that no record has taken over


def read_end(store: Store, name: str) -> End:
    """How far the log goes: one listing and one record, however long it is."""
    paths = store.list_records(f"models/{name}/")
    log = [path for path in paths if number_of(path)]
    last = (store.read_record(log[-1]) or {}) if log else {}
    taken = str(last.get("taken") or "")
    late = [path for path in paths if path.count("/") == 2 and path > taken]
    return End(log, last, late)


def read_log(store: Store, name: str) -> tuple[Model, End]:
    """All of it. Raises ArtifactCorrupt when a record is none of a model's."""
    end = read_end(store, name)
    paths = [*end.paths, *end.late]
    records = in_parallel(store.read_record, paths, REQUESTS_AT_ONCE)
    found = [(path, record) for path, record in zip(paths, records, strict=True) if record]
    return fold(name, (t for path, record in found for t in _transitions(path, record))), end


def _transitions(path: str, record: dict[str, Any]) -> Iterable[Transition]:
    """Those of one record; of a publication without a log, its promotion."""
    number = number_of(path)
    many = record.get("versions")
    for part in many if isinstance(many, list) else [record]:
        part = part if isinstance(part, dict) else {}
        told = {key: str(part.get(key) or "") for key in ("run", "time", "reason")}
        action = str(part.get("action") or "promote")
        if action not in ("candidate", "archive", *LIVED):
            raise ArtifactCorrupt(
                f"record {path} tells of {action!r}, which this version of the program does not "
                "know; use the version that wrote it"
            )
        told["time"] = _iso(told["time"])
        yield Transition(number, action, digest_of(part, path), **told)


def fold(name: str, transitions: Iterable[Transition]) -> Model:
    """What transitions amount to, in their order."""
    versions: dict[str, Version] = {}
    champions: list[str] = []
    archived: dict[str, None] = {}  # ordered
    history = tuple(transitions)

    def put(digest: str, state: State, told: Transition | None = None) -> None:
        version = versions.get(digest)
        if version is None:
            assert told is not None
            number = len(versions) + 1
            version = Version(number, digest, state, told.run, told.time)
        reason = told.reason if told else version.reason
        versions[digest] = replace(version, state=state, reason=reason)
        archived.pop(digest, None)
        if state == "archived":
            archived[digest] = None

    for told in history:
        if told.action in LIVED:
            if champions and champions[-1] != told.digest:
                put(champions[-1], "archived")
            if told.action == "rollback" and told.digest in champions:
                del champions[len(champions) - champions[::-1].index(told.digest) :]
            elif not champions or champions[-1] != told.digest:
                champions.append(told.digest)
            put(told.digest, "champion", told)
        else:
            put(told.digest, "candidate" if told.action == "candidate" else "archived", told)
    ordered = tuple(sorted(versions.values(), key=lambda v: v.number))
    return Model(name, ordered, history, tuple(champions), tuple(archived))


def digest_of(record: dict[str, Any], path: str) -> str:
    """The artifact that a record names. Raises ArtifactCorrupt when it names none."""
    digest = record.get("digest")
    if not isinstance(digest, str) or not digest:
        raise ArtifactCorrupt(f"record {path} names no artifact, as one of a model does; delete it")
    return digest


def number_of(path: str) -> int:
    """A transition's place in its log; 0 for a publication without one."""
    match = _LOG.fullmatch(path)
    return int(match[1]) if match else 0


def _iso(stamp: str) -> str:
    """A time as it is written now; publications without a log had 20240501T120000.123456Z."""
    try:
        when = datetime.strptime(stamp, "%Y%m%dT%H%M%S.%fZ").replace(tzinfo=UTC)
    except ValueError:
        return stamp
    return when.isoformat(timespec="microseconds")
