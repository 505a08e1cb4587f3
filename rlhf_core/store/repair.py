"""Finds what is damaged in a store, heals what has a good copy, and clears the rest out of the way.

What is cleared counts as not there: a stage whose result needs it runs again, and publishing the
same bytes puts them back. Damaged manifests and records are moved to quarantine/, from where a
garbage collection deletes them; a damaged file, whose name is the sha256 of what it should hold, is
deleted.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rlhf_core.errors import ArtifactCorrupt, ObjectUnreadable
from rlhf_core.store.artifact import Artifact, FileEntry, parse_manifest
from rlhf_core.store.backend import Backend, Entry
from rlhf_core.store.blobs import Source, blob_key, check_blob, read_source, upload_blob
from rlhf_core.store.collect import BATCH, QUARANTINE
from rlhf_core.store.leases import CollectionFlag
from rlhf_core.store.local import file_errors, hash_file
from rlhf_core.store.parallel import FILES_AT_ONCE, REQUESTS_AT_ONCE, in_parallel
from rlhf_core.store.records import model_problem, parse_record, read_record
from rlhf_core.store.refs import MANIFEST

log = logging.getLogger("rlhf_core.store")

_SCOPE = re.compile(r"((?:checkpoints/[^/]+/)?)(.+)")
_BLOB = re.compile(r"blobs/sha256/[0-9a-f]{2}/([0-9a-f]{64})")
_OTHERS = ("blobs/", "artifacts/", "leases/", "gc/", "probes/", QUARANTINE)  # that are no records


UNREADABLE = "the server has an entry for it, but cannot read it"
REPLACED = "nothing: it has been replaced meanwhile"
KEPT = "nothing: a part of the server may be down; --lost clears it away"


@dataclass(frozen=True)
class Damage:
    """Something damaged.

    Attributes:
        scope: "", or the prefix of a scoped store. key: inside of it.
        artifacts: ``kind/digest`` of those that cannot be used because of it.
        unreadable: the server has an entry for it, but cannot read it.
        size: bytes that a file should have; None: no readable manifest says it.
        done: what `repair` did about it. healed: whether all is as it should be now.
    """

    scope: str
    key: str
    what: Literal["file", "manifest", "record"]
    problem: str
    artifacts: tuple[str, ...] = ()
    size: int | None = None
    unreadable: bool = False
    done: str = ""
    healed: bool = False


def find_damage(backend: Backend) -> list[Damage]:
    """Read the whole store, checkpoints included; returns what is damaged or missing."""
    scopes: dict[str, list[Entry]] = defaultdict(list)
    for entry in backend.entries(""):
        if match := _SCOPE.fullmatch(entry.key):
            scopes[match[1]].append(replace(entry, key=match[2]))
    return [each for scope, there in sorted(scopes.items()) for each in _in(backend, scope, there)]


def _in(backend: Backend, scope: str, entries: Sequence[Entry]) -> list[Damage]:
    """The damage of one store or scope."""
    inside = _scoped(backend, scope)
    manifests = [m for entry in entries if (m := MANIFEST.fullmatch(entry.key))]
    read = in_parallel(lambda m: _manifest(inside, m[0]), manifests, REQUESTS_AT_ONCE)
    found = [
        Damage(
            scope,
            match[0],
            "manifest",
            problem,
            (f"{match[1]}/{match[2]}",),
            unreadable=problem == UNREADABLE,
        )
        for match, (_, problem) in zip(manifests, read, strict=True)
        if problem
    ]
    records = [e.key for e in entries if e.key.endswith(".json") and not e.key.startswith(_OTHERS)]
    texts = in_parallel(lambda key: _record_problem(inside, key), records, REQUESTS_AT_ONCE)
    found += [
        Damage(scope, k, "record", text, unreadable=text == UNREADABLE)
        for k, text in zip(records, texts, strict=True)
        if text
    ]
    sizes = {match[1]: e.size for e in entries if (match := _BLOB.fullmatch(e.key))}
    needed: dict[str, list[str]] = defaultdict(list)
    for artifact, _ in read:
        if artifact is None:
            continue
        for entry in artifact.files:
            sizes[entry.sha256] = entry.size
            needed[entry.sha256].append(f"{artifact.kind}/{artifact.digest}")
    files = [FileEntry("", size, sha256) for sha256, size in sorted(sizes.items())]
    problems = in_parallel(lambda entry: _file_problem(inside, entry), files, FILES_AT_ONCE)
    for entry, text in zip(files, problems, strict=True):
        if text:
            refs = tuple(sorted(set(needed[entry.sha256])))
            size = entry.size if refs else None
            key, unreadable = blob_key(entry.sha256), text == UNREADABLE
            found.append(Damage(scope, key, "file", text, refs, size, unreadable))
    return found


def repair(
    backend: Backend, damage: Iterable[Damage], folders: Sequence[Path], lost: bool = False
) -> list[Damage]:
    """Heal or clear damage; each item is looked at again before.

    Args:
        folders: are searched for files with the right sha256.
        lost: clear away what is unreadable, too. Not while a part of the server is down.

    Returns:
        The damage, with what was done about it.
    """
    backend.free_reserve()
    copies, scopes = _Copies(folders), defaultdict(list)
    for each in damage:
        scopes[each.scope].append(each)
    done = []
    for scope, found in scopes.items():
        inside = _scoped(backend, scope)
        mending = _Mending(inside, copies, lost)
        with CollectionFlag(inside) as flag:  # nobody may rely on what goes
            for start in range(0, len(found), BATCH):
                flag.check()
                done += in_parallel(mending.mend, found[start : start + BATCH], REQUESTS_AT_ONCE)
    return done


def _scoped(backend: Backend, scope: str) -> Backend:
    return backend.scoped(scope.rstrip("/")) if scope else backend


def _bytes(backend: Backend, key: str) -> tuple[bytes | None, str]:
    """A value, and why it cannot be read; (None, "") if it is gone."""
    try:
        return backend.read(key), ""
    except ObjectUnreadable:
        return None, UNREADABLE


def _manifest(backend: Backend, key: str) -> tuple[Artifact | None, str]:
    """The artifact, and why its manifest cannot be read; (None, "") if it is gone."""
    data, problem = _bytes(backend, key)
    try:
        return (None if data is None else parse_manifest(data, key, key.split("/")[2])), problem
    except ArtifactCorrupt as error:
        return None, str(error).partition("; ")[0]


def _record_problem(backend: Backend, key: str) -> str:
    data, unreadable = _bytes(backend, key)
    if data is None:
        return unreadable
    value, problem = parse_record(data)
    return problem or (model_problem(value) if key.startswith("models/") else "")


def _file_problem(backend: Backend, entry: FileEntry) -> str:
    try:
        return check_blob(backend, entry)
    except ObjectUnreadable:
        return UNREADABLE


@dataclass(frozen=True)
class _Mending:
    """What mends the damage of one store or scope."""

    backend: Backend
    copies: _Copies
    lost: bool

    def mend(self, damage: Damage) -> Damage:
        """Look again, and heal or clear the damage; returns it with what was done."""
        text, healed = self._file(damage) if damage.what == "file" else self._json(damage)
        return replace(damage, done=text, healed=healed)

    def _json(self, damage: Damage) -> tuple[str, bool]:
        key, before = damage.key, _bytes(self.backend, damage.key)
        manifest = damage.what == "manifest"
        problem = (
            _manifest(self.backend, key)[1] if manifest else _record_problem(self.backend, key)
        )
        if not problem:
            return REPLACED, True
        if problem == UNREADABLE and not self.lost:
            return KEPT, False
        if before[0] is not None:
            self.backend.write(f"{QUARANTINE}{key}", before[0])
        stand_in = rebuilt(self.backend, key)
        if _bytes(self.backend, key) != before:  # a writer was faster: look at what it wrote
            return self._json(damage)
        if stand_in is not None:
            self.backend.write(key, json.dumps(stand_in, indent=1, sort_keys=True).encode())
            promoted = stand_in["digest"][:12]
            return f"rebuilt by the records around it: a promotion of {promoted}", True
        self.backend.delete(key)
        return ("deleted" if problem == UNREADABLE else f"moved to {QUARANTINE}{key}"), False

    def _file(self, damage: Damage) -> tuple[str, bool]:
        key, sha256 = damage.key, damage.key[-64:]
        size = self.backend.size(key)
        problem = (
            "missing" if size is None else _file_problem(self.backend, FileEntry("", size, sha256))
        )
        if not problem:
            return REPLACED, True
        source = None
        if damage.size is not None:
            source = self.copies.find(FileEntry("", damage.size, sha256))
        if source is not None:
            upload_blob(self.backend, source, force=True)
            self.backend.settle([key])
            return f"replaced by {source.content!s}", True
        if size is None:
            return "nothing: there is no copy", False
        if problem == UNREADABLE and not self.lost:
            return KEPT, False
        self.backend.delete(key)
        return "deleted", False


def rebuilt(backend: Backend, key: str) -> dict[str, Any] | None:
    """A stand-in for a damaged record of a model's log: the promotion that its neighbours tell of.

    Each record names the champion after it. If the next one did not change it, and it is not that
    of the one before, the damaged record did. None if the neighbours do not tell.
    """
    folder = key.rpartition("/")[0] + "/"
    if not re.fullmatch(r"models/[^/]+/log/", folder):
        return None
    keys = backend.keys(folder)
    place = keys.index(key)
    if place + 1 == len(keys):
        return None
    before = (read_record(backend, keys[place - 1]) if place else None) or {}
    after = read_record(backend, keys[place + 1]) or {}
    champion = after.get("champion")
    unchanged = after.get("action") in ("candidate", "archive")
    if not unchanged or not champion or champion == before.get("champion"):
        return None
    about = {name: after.get(name) for name in ("name", "order", "taken", "champion")}
    reason = "rebuilt, since this record was damaged"
    return {**about, "action": "promote", "digest": champion, "reason": reason}


class _Copies:
    """Files below some folders, by their size and then by their sha256."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._by_size: dict[int, list[Path]] = defaultdict(list)
        for folder in folders:
            for parent, _, names in os.walk(folder):
                for path in (Path(parent, name) for name in names):
                    if path.is_file() and not path.is_symlink():
                        self._by_size[path.stat().st_size].append(path)

    def find(self, entry: FileEntry) -> Source | None:
        """A file with the content of an entry; None if there is none."""
        for path in self._by_size.get(entry.size, ()):
            with file_errors(path):
                if path.exists() and hash_file(path) == entry.sha256:
                    return read_source(entry.path, path)
        return None
