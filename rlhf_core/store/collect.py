"""Garbage collection: finds and deletes what no kept artifact references."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass, field
from typing import Any

from rlhf_core.errors import ArtifactCorrupt, StoreError, StoreUnavailable
from rlhf_core.store.artifact import Artifact, parse_manifest
from rlhf_core.store.backend import Backend, Entry
from rlhf_core.store.leases import FLAGS, LEASES, CollectionFlag
from rlhf_core.store.parallel import REQUESTS_AT_ONCE, in_parallel
from rlhf_core.store.refs import MANIFEST

log = logging.getLogger("rlhf_core.store")

SCOPES = "checkpoints"
QUARANTINE = "quarantine/"  # what a repair has set aside
BATCH = 64  # deletions between two checks of the flag
LEASE_SECONDS = 3600.0  # a lease is valid for at least this long, however short the grace period
Roots = Callable[[], Set[str]]


@dataclass(frozen=True)
class Limits:
    """Ages in seconds, by the backend's clock.

    Attributes:
        keep: artifacts that were published or reused by a stage more recently are kept.
        grace: nothing that was written more recently is deleted; longer than any upload takes.
    """

    keep: float
    grace: float

    def __post_init__(self) -> None:
        assert self.keep >= self.grace


@dataclass
class Garbage:
    """What a collection deletes, in the order of deletion.

    Attributes:
        artifacts: (``kind/digest[:12]``, creation time or "" if the manifest is unreadable).
        manifests, blobs: their entries. checkpoints: all entries below `checkpoints/`.
        others: stage records without an artifact, old leases, probes and records of `memory/`,
            `candidates/` and `quarantine/`.
        notes: why something that looks like garbage is kept.
        kept: number of artifacts that stay.
        uploads: number of unfinished uploads that were removed.
    """

    artifacts: list[tuple[str, str]] = field(default_factory=list)
    manifests: list[Entry] = field(default_factory=list)
    blobs: list[Entry] = field(default_factory=list)
    checkpoints: list[Entry] = field(default_factory=list)
    others: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    kept: int = 0
    uploads: int = 0

    @property
    def entries(self) -> list[Entry]:
        """All entries to delete."""
        return [*self.manifests, *self.others, *self.blobs, *self.checkpoints]

    @property
    def size(self) -> int:
        """Bytes of all entries to delete."""
        return sum(entry.size for entry in self.entries)


def find_garbage(backend: Backend, roots: Roots, limits: Limits) -> Garbage:
    """What a collection would delete now; nothing is deleted. Arguments as for `collect`."""
    now = backend.now()
    garbage = _find_all(backend, roots, limits, now)
    for scope in backend.folders(SCOPES):
        below = _find_all(backend.scoped(f"{SCOPES}/{scope}"), set, limits, now).entries
        garbage.checkpoints += [_below(scope, entry) for entry in below]
    return garbage


def collect(backend: Backend, roots: Roots, limits: Limits) -> Garbage:
    """Delete the garbage and return it. Writers may run at the same time, see `leases`.

    Args:
        roots: gives the digests to keep, together with their parents; called once no new writer
            can start.
        limits: ages below which nothing is deleted.

    Raises:
        StoreError: it failed midway; kept artifacts are untouched, and the next run deletes the
            rest.
    """
    now = backend.now()
    uploads, note = _sweep(backend, limits)  # first, since a full disk needs space for the flag
    backend.free_reserve()
    with CollectionFlag(backend) as flag:
        garbage = _find_all(backend, roots, limits, now)
        delete_all(backend, garbage, flag)
    for scope in backend.folders(SCOPES):
        scoped = backend.scoped(f"{SCOPES}/{scope}")
        if _find_all(scoped, set, limits, now).entries:
            with CollectionFlag(scoped) as flag:
                found = _find_all(scoped, set, limits, now)
                delete_all(scoped, found, flag)
            garbage.checkpoints += [_below(scope, entry) for entry in found.entries]
    garbage.uploads = uploads
    garbage.notes += note
    return garbage


def _below(scope: str, entry: Entry) -> Entry:
    return Entry(f"{SCOPES}/{scope}/{entry.key}", entry.size, entry.modified)


def _sweep(backend: Backend, limits: Limits) -> tuple[int, list[str]]:
    """Number of unfinished uploads that were removed, and a note if that was not possible."""
    try:
        return backend.sweep(limits.grace), []
    except StoreUnavailable:
        raise
    except StoreError as error:
        return 0, [f"unfinished uploads of killed writers stay, because {error}"]


@dataclass
class _Listing:
    """One store or scope as it was listed, before anything is judged.

    Attributes:
        leases: of every writer. leased: contents of those that still count.
        stages: key -> entry of each stage record. results: key -> its contents.
        manifests: digest -> entry. artifacts: digest -> artifact, of the readable manifests.
    """

    now: float
    leases: list[Entry]
    leased: list[dict[str, Any]]
    stages: dict[str, Entry]
    results: dict[str, dict[str, Any]]
    roots: Set[str]
    manifests: dict[str, Entry]
    artifacts: dict[str, Artifact]

    def older(self, entry: Entry, limit: float) -> bool:
        """Whether an entry was written more than ``limit`` seconds ago."""
        return self.now - entry.modified > limit


def list_all(backend: Backend, roots: Roots, limits: Limits, now: float) -> _Listing:
    """Leases first, then stage records and roots, then manifests; `leases` says why."""
    leases = backend.entries(LEASES)
    lease_age = max(limits.grace, LEASE_SECONDS)
    leased = [_json(backend, e) for e in leases if now - e.modified <= lease_age]
    stages = {entry.key: entry for entry in backend.entries("stages/")}
    read_all = in_parallel(lambda e: _json(backend, e), stages.values(), REQUESTS_AT_ONCE)
    results = dict(zip(stages, read_all, strict=True))
    wanted = set(roots())
    manifests = {
        match[2]: entry
        for entry in backend.entries("artifacts/")
        if (match := MANIFEST.fullmatch(entry.key))
    }
    read = in_parallel(lambda item: _manifest(backend, *item), manifests.items(), REQUESTS_AT_ONCE)
    artifacts = {a.digest: a for a in read if a is not None}
    return _Listing(now, leases, leased, stages, results, wanted, manifests, artifacts)


def _find_all(backend: Backend, roots: Roots, limits: Limits, now: float) -> Garbage:
    """The garbage of one store or scope."""
    listing = list_all(backend, roots, limits, now)
    kept = _reachable(_wanted(listing, limits), listing.artifacts)
    present = kept & listing.manifests.keys()
    garbage = Garbage(kept=len(present))
    for digest in listing.manifests.keys() - kept:
        manifest = listing.manifests[digest]
        created = listing.artifacts[digest].created if digest in listing.artifacts else ""
        garbage.artifacts.append((ref_of(manifest), created))
        garbage.manifests.append(manifest)
    garbage.others = _old_records(backend, listing, limits, present)
    if unread := sorted(present - listing.artifacts.keys()):
        garbage.notes.append(
            "no file is deleted, because the manifest of "
            + ", ".join(ref_of(listing.manifests[digest]) for digest in unread)
            + " is damaged and its files are unknown; publish it again, or run "
            "`rlhf artifacts repair`"
        )
        return garbage
    named = named_files(listing, (listing.artifacts[d] for d in kept & listing.artifacts.keys()))
    garbage.blobs = [
        entry
        for entry in backend.entries("blobs/")
        if entry.key.rpartition("/")[2] not in named and listing.older(entry, limits.grace)
    ]
    return garbage


def named_files(listing: _Listing, artifacts: Iterable[Artifact]) -> set[str]:
    """sha256 of the files of some artifacts, and of those that writers have announced."""
    named = {entry.sha256 for artifact in artifacts for entry in artifact.files}
    return named | {str(sha) for value in listing.leased for sha in value.get("blobs", [])}


def _wanted(listing: _Listing, limits: Limits) -> set[str]:
    """Digests that stay, without their parents: roots, leased, recently published or reused."""
    wanted = set(listing.roots)
    wanted |= {
        digest
        for digest, entry in listing.manifests.items()
        if not listing.older(entry, limits.keep)
    }
    wanted |= {str(value.get("artifact")) for value in listing.leased}
    wanted |= {
        str(listing.results[key].get("digest"))
        for key, entry in listing.stages.items()
        if not listing.older(entry, limits.keep)
    }
    return wanted


def _old_records(
    backend: Backend, listing: _Listing, limits: Limits, present: Set[str]
) -> list[Entry]:
    """Old stage records, leases, probes and other small files that nothing needs."""
    found = [
        entry
        for key, entry in listing.stages.items()
        if listing.older(entry, limits.keep) and listing.results[key].get("digest") not in present
    ]
    found += [e for e in listing.leases if listing.older(e, max(limits.grace, LEASE_SECONDS))]
    # A stage that once ran out of memory and has not run since: it would start as configured.
    found += [e for e in backend.entries("memory/") if listing.older(e, limits.keep)]
    # Output of a failed stage: by now a version of a model, or abandoned.
    found += [e for e in backend.entries("candidates/") if listing.older(e, limits.keep)]
    found += [e for e in backend.entries(QUARANTINE) if listing.older(e, limits.keep)]
    litter = [*backend.entries("probes/"), *backend.entries("gc/")]
    found += [e for e in litter if not e.key.startswith(FLAGS) and listing.older(e, limits.grace)]
    return found


def ref_of(manifest: Entry) -> str:
    _, kind, digest, _ = manifest.key.split("/")
    return f"{kind}/{digest[:12]}"


def _reachable(wanted: Iterable[str], artifacts: dict[str, Artifact]) -> set[str]:
    """The wanted digests, their parents, and so on."""
    found: set[str] = set()
    todo = list(wanted)
    while todo:
        digest = todo.pop()
        if digest not in found:
            found.add(digest)
            todo += artifacts[digest].parents if digest in artifacts else ()
    return found


def _manifest(backend: Backend, digest: str, entry: Entry) -> Artifact | None:
    data = backend.read(entry.key)
    try:
        return None if data is None else parse_manifest(data, entry.key, digest)
    except ArtifactCorrupt as error:
        log.warning("%s", error)
        return None


def _json(backend: Backend, entry: Entry) -> dict[str, Any]:
    """A small JSON record; {} if it is missing or not an object."""
    try:
        value = json.loads(backend.read(entry.key) or b"{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def delete_all(backend: Backend, garbage: Garbage, flag: CollectionFlag) -> None:
    """Delete manifests before blobs, so that a kill or a power cut breaks no artifact."""
    quick = backend.with_short_timeouts()  # a deletion must end long before the flag is stale
    manifests = [entry.key for entry in garbage.manifests]
    for keys in (manifests, [e.key for e in garbage.entries[len(manifests) :]]):
        for start in range(0, len(keys), BATCH):
            flag.check()
            in_parallel(quick.delete, keys[start : start + BATCH], REQUESTS_AT_ONCE)
        backend.settle(keys)
