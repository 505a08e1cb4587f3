"""The versions of a model name, computed from its log of transitions; see `registry`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

from rlhf_core.errors import ArtifactCorrupt, ArtifactNotFound, ConfigError
from rlhf_core.store.parallel import REQUESTS_AT_ONCE, in_parallel
from rlhf_core.store.records import model_problem
from rlhf_core.store.store import Store

State = Literal["candidate", "champion", "archived"]
CHAMPION_ACTIONS = "promote", "rollback"
"""Actions that make a version the champion."""
_LOG = re.compile(r"models/[^/]+/log/([0-9]{8,})\.json")


@dataclass(frozen=True)
class Transition:
    """A change of a version's state.

    Attributes:
        number: of the log record; merged publications share one.
        action: candidate, promote, rollback or archive.
        time: ISO 8601, UTC.
    """

    number: int
    action: str
    digest: str
    run: str = ""
    time: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Version:
    """A version of a model. Versions are numbered from 1 within their name."""

    number: int
    digest: str
    state: State
    run: str
    time: str
    reason: str = ""  # of its last transition


@dataclass(frozen=True)
class Model:
    """All versions of a name at one moment.

    Attributes:
        champions: digests as a stack; a rollback pops the last one.
        archived: digests in the order in which they were archived.
    """

    name: str
    versions: tuple[Version, ...]
    history: tuple[Transition, ...]
    champions: tuple[str, ...]
    archived: tuple[str, ...]

    @property
    def champion(self) -> Version | None:
        """The published version; None if there is none."""
        return next((v for v in self.versions if v.state == "champion"), None)

    def version(self, digest: str) -> Version | None:
        """The version with an artifact's digest; None if there is none."""
        return next((v for v in self.versions if v.digest == digest), None)

    def find(self, wanted: str) -> Version:
        """A version by its number or by the start of its digest.

        Raises:
            ArtifactNotFound: no version matches.
            ConfigError: several versions match.
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
            f"{self.name} has no version {wanted!r}; expected a number or at least 6 digits of a "
            f"digest. Versions: {shown}."
        )


@dataclass(frozen=True)
class LogEnd:
    """The end of a name's log.

    Attributes:
        paths: of the log's records, in order.
        last: the last record.
        unmerged: paths of publications that are not in the log.
    """

    paths: list[str]
    last: dict[str, Any]
    unmerged: list[str]


def read_end(store: Store, name: str) -> LogEnd:
    """The end of the log. It needs one listing and one record, however long the log is."""
    paths = store.list_records(f"models/{name}/")
    log = [path for path in paths if number_of(path)]
    last = (_read(store, log[-1]) or {}) if log else {}
    taken = str(last.get("taken") or "")
    unmerged = [path for path in paths if path.count("/") == 2 and path > taken]
    return LogEnd(log, last, unmerged)


def read_log(store: Store, name: str) -> tuple[Model, LogEnd]:
    """The state after the whole log, and the log's end.

    Raises:
        ArtifactCorrupt: a record is not one of a model.
    """
    end = read_end(store, name)
    paths = [*end.paths, *end.unmerged]
    records = in_parallel(lambda path: _read(store, path), paths, REQUESTS_AT_ONCE)
    found = [(path, record) for path, record in zip(paths, records, strict=True) if record]
    return fold(name, (t for path, record in found for t in _transitions(path, record))), end


def _read(store: Store, path: str) -> dict[str, Any] | None:
    """A record of a model. Raises ArtifactCorrupt: the state follows from all of them."""
    try:
        record = store.read_record(path, strict=True)
    except ArtifactCorrupt as error:
        raise ArtifactCorrupt(f"{error}. {_way_out(path)}") from error
    if record is not None and (problem := model_problem(record)):
        raise ArtifactCorrupt(
            f"record {path} of a model cannot be used: {problem}. {_way_out(path)}"
        )
    return record


def _way_out(path: str) -> str:
    name = path.split("/")[1]
    return (
        f"So the state of the model {name!r} is not known; other models are not affected. Restore "
        "the record from a backup, or run `rlhf artifacts repair --yes`, which sets it aside: what "
        f"it recorded is then lost (see `rlhf models show {name}` and promote again)."
    )


def _transitions(path: str, record: dict[str, Any]) -> Iterable[Transition]:
    """The transitions of one record; for a publication without a log, its promotion."""
    number = number_of(path)
    many = record.get("versions")
    for part in many if isinstance(many, list) else [record]:
        part = part if isinstance(part, dict) else {}
        transition = {key: str(part.get(key) or "") for key in ("run", "time", "reason")}
        action = str(part.get("action") or "promote")
        if action not in ("candidate", "archive", *CHAMPION_ACTIONS):
            raise ArtifactCorrupt(
                f"record {path} has the unknown action {action!r}; use the version of the program "
                "that wrote it"
            )
        transition["time"] = _iso(transition["time"])
        yield Transition(number, action, digest_of(part, path), **transition)


def fold(name: str, transitions: Iterable[Transition]) -> Model:
    """The state after some transitions, in their order."""
    versions: dict[str, Version] = {}
    champions: list[str] = []
    archived: dict[str, None] = {}  # ordered
    history = tuple(transitions)

    def put(digest: str, state: State, transition: Transition | None = None) -> None:
        version = versions.get(digest)
        if version is None:
            assert transition is not None
            number = len(versions) + 1
            version = Version(number, digest, state, transition.run, transition.time)
        reason = transition.reason if transition else version.reason
        versions[digest] = replace(version, state=state, reason=reason)
        archived.pop(digest, None)
        if state == "archived":
            archived[digest] = None

    for transition in history:
        if transition.action in CHAMPION_ACTIONS:
            if champions and champions[-1] != transition.digest:
                put(champions[-1], "archived")
            if transition.action == "rollback" and transition.digest in champions:
                del champions[len(champions) - champions[::-1].index(transition.digest) :]
            elif not champions or champions[-1] != transition.digest:
                champions.append(transition.digest)
            put(transition.digest, "champion", transition)
        else:
            put(
                transition.digest,
                "candidate" if transition.action == "candidate" else "archived",
                transition,
            )
    ordered = tuple(sorted(versions.values(), key=lambda v: v.number))
    return Model(name, ordered, history, tuple(champions), tuple(archived))


def digest_of(record: dict[str, Any], path: str) -> str:
    """The digest in a record. Raises ArtifactCorrupt if it has none."""
    digest = record.get("digest")
    if not isinstance(digest, str) or not digest:
        raise ArtifactCorrupt(f"record {path} of a model names no artifact. {_way_out(path)}")
    return digest


def number_of(path: str) -> int:
    """A record's number in its log; 0 for a publication without a log."""
    match = _LOG.fullmatch(path)
    return int(match[1]) if match else 0


def _iso(stamp: str) -> str:
    """A time as ISO 8601; publications without a log have 20240501T120000.123456Z."""
    try:
        when = datetime.strptime(stamp, "%Y%m%dT%H%M%S.%fZ").replace(tzinfo=UTC)
    except ValueError:
        return stamp
    return when.isoformat(timespec="microseconds")
