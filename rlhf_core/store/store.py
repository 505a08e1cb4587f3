"""The artifact store: files by content, and manifests that make sets of them appear at once.

Layout:
    blobs/sha256/ab/<sha256>                      never changes
    artifacts/<kind>/<digest>/manifest.json       written last, created once
    stages/<key>.json, runs/…, models/…           small JSON records
    leases/…, gc/…                                of writers and a collector, see claims
    <prefix>/…                                    the same again, for a scoped store
"""

from __future__ import annotations

import builtins
import hashlib
import logging
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rlhf_core.errors import ArtifactCorrupt, ArtifactNotFound, StoreError, StoreUnavailable
from rlhf_core.store import records, stages
from rlhf_core.store.artifact import (
    KIND,
    SHA256,
    Artifact,
    FileEntry,
    check_kind,
    check_path,
    parse_manifest,
)
from rlhf_core.store.backend import Backend
from rlhf_core.store.blobs import (
    blob_key,
    check_blob,
    compare,
    corrupt,
    read_source,
    upload_blob,
)
from rlhf_core.store.collect import Garbage, Limits, Roots, collect, find_garbage
from rlhf_core.store.folders import fetch_cached, fetch_to, walk
from rlhf_core.store.parallel import FILES_AT_ONCE, REQUESTS_AT_ONCE, in_parallel
from rlhf_core.store.publishing import holding, publish
from rlhf_core.store.refs import find_refs, manifest_key, resolve

log = logging.getLogger("rlhf_core.store")


class Store:
    """Artifacts and records at one URL. Safe to use from threads, and after a fork.

    Every method raises StoreUnavailable when the place cannot be reached, refuses the key or is
    full, StoreError when it fails otherwise, and ConfigError for arguments that cannot be meant.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._artifacts: dict[str, Artifact] = {}

    @property
    def url(self) -> str:
        return self._backend.url

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {"_backend": self._backend, "_artifacts": {}}

    # Artifacts: writing

    def publish(
        self,
        folder: Path,
        *,
        kind: str,
        metadata: Mapping[str, Any] | None = None,
        parents: Sequence[str] = (),
    ) -> Artifact:
        """Publish all files below a folder; files that the store holds are not sent again.

        Publishing the same files, kind, metadata and parents again returns the artifact that is
        there. Raises ConfigError for a symbolic link or an empty folder.
        """
        return self.publish_derived(
            kind=kind, files=walk(Path(folder)), metadata=metadata, parents=parents
        )

    def publish_derived(
        self,
        *,
        kind: str,
        files: Mapping[str, Path | FileEntry | bytes],
        metadata: Mapping[str, Any] | None = None,
        parents: Sequence[str] = (),
    ) -> Artifact:
        """Publish files by their path in the artifact: local files, bytes, or entries of artifacts
        in this store, whose content is taken over without being sent."""
        return publish(self._backend, kind, files, metadata, parents)

    # Artifacts: reading

    def get(self, ref: str) -> Artifact:
        """The artifact that a digest, a unique start of one (6 digits or more) or ``kind/start``
        names. Raises ArtifactNotFound with what comes near, ConfigError when several match."""
        kind, digest = resolve(self._backend, ref)
        return self._read(kind, digest)

    def _read(self, kind: str, digest: str) -> Artifact:
        # A record that someone has written may hold anything, a path out of the store too.
        if not all(isinstance(part, str) for part in (kind, digest)) or not (
            KIND.fullmatch(kind) and SHA256.fullmatch(digest)
        ):
            raise ArtifactNotFound(f"{str(kind)[:80]!r}/{str(digest)[:80]!r} names no artifact")
        key = manifest_key(kind, digest)
        data = self._backend.read(key)
        if data is None:
            raise ArtifactNotFound(f"artifact {kind}/{digest[:12]} is not in {self.url}")
        artifact = parse_manifest(data, key, digest)
        self._artifacts[digest] = artifact
        return artifact

    def list(self, kind: str | None = None) -> builtins.list[Artifact]:
        """All artifacts, newest first. One whose manifest is damaged is left out with a warning."""

        def read(ref: tuple[str, str]) -> Artifact | None:
            try:
                return self._artifacts.get(ref[1]) or self._read(*ref)
            except ArtifactNotFound:
                return None  # deleted since it was listed
            except StoreUnavailable:
                raise
            except StoreError as error:
                log.warning("left out of the list: %s", error)
                return None

        refs = find_refs(self._backend, kind if kind is None else check_kind(kind))
        found = in_parallel(read, refs, REQUESTS_AT_ONCE)
        return sorted(
            (artifact for artifact in found if artifact is not None),
            key=lambda artifact: (artifact.created, artifact.digest),
            reverse=True,
        )

    def lineage(self, digest: str) -> dict[str, Artifact | None]:
        """An artifact, its parents, theirs, and so on, by digest; None for those that are gone or
        damaged."""

        def read(digest: str) -> Artifact | None:
            try:
                return self._read(kinds[digest], digest) if digest in kinds else None
            except (ArtifactNotFound, ArtifactCorrupt):
                return None

        kinds = {each: kind for kind, each in find_refs(self._backend, None)}
        known: dict[str, Artifact | None] = {}
        todo = {digest}
        while todo:
            names = sorted(todo)
            found = in_parallel(read, names, REQUESTS_AT_ONCE)
            known |= zip(names, found, strict=True)
            todo = {parent for artifact in found if artifact for parent in artifact.parents}
            todo -= known.keys()
        return known

    def fetch(self, ref: str, destination: Path | None = None) -> Path:
        """The artifact's files in a local folder, each verified against its sha256.

        Without ``destination`` it is a cache below ``rlhf_home()``, to be read only, which all
        processes of a machine share: they wait for the first one's download. With one, the folder
        must be new or empty (or hold exactly this artifact) and appears complete or not at all.
        Raises ArtifactCorrupt when the stored bytes are not those of the manifest.
        """
        artifact = self.get(ref)
        if destination is None:
            return fetch_cached(self._backend, artifact)
        return fetch_to(self._backend, artifact, Path(destination))

    def read_bytes(self, ref: str, path: str) -> bytes:
        """One file, whole and in memory, verified. Raises ArtifactCorrupt."""
        artifact = self.get(ref)
        entry = artifact.file(path)
        found = ""
        for _ in range(3 if self._backend.remote else 1):
            data = self._backend.read(blob_key(entry.sha256))
            if data is None:
                found = "the blob is missing"
                continue
            found = compare(entry, len(data), hashlib.sha256(data).hexdigest())
            if not found:
                return data
        raise corrupt(self._backend, entry, found, artifact.ref)

    def verify(self, ref: str) -> builtins.list[str]:
        """Read every blob of an artifact again; the problems found, one text each."""
        artifact = self.get(ref)

        def check(entry: FileEntry) -> str:
            found = check_blob(self._backend, entry)
            return found and str(corrupt(self._backend, entry, found, artifact.ref))

        return [text for text in in_parallel(check, artifact.files, FILES_AT_ONCE) if text]

    def repair(self, ref: str, folder: Path) -> builtins.list[str]:
        """Put damaged blobs right from a folder with good copies; the problems that remain."""
        artifact = self.get(ref)
        for entry in artifact.files:
            copy = Path(folder) / entry.path
            if check_blob(self._backend, entry) and copy.is_file():
                source = read_source(entry.path, copy)
                if source.entry == entry:
                    upload_blob(self._backend, source, force=True)
        return self.verify(f"{artifact.kind}/{artifact.digest}")

    def holding(self, ref: str) -> AbstractContextManager[Artifact]:
        """The artifact, whole, and out of a collector's reach until the block ends: for a record
        that is to name it. Raises ArtifactNotFound, or ArtifactCorrupt when files are missing."""
        return holding(self._backend, self.get(ref))

    def delete(self, digest: str, *, blobs: bool = False) -> None:
        """Remove an artifact, and with ``blobs`` those of its blobs that no other artifact in this
        store (or scoped store) names.

        With ``blobs`` nothing else may publish to the same store meanwhile: it could take over a
        blob that is about to go. Raises ArtifactNotFound.
        """
        kind, digest = resolve(self._backend, digest)
        artifact = None
        try:
            artifact = self._read(kind, digest)
        except ArtifactCorrupt as error:
            log.warning("deleting %s/%s, whose blobs are not known: %s", kind, digest[:12], error)
        self._backend.delete(manifest_key(kind, digest))
        self._artifacts.pop(digest, None)
        if not blobs or artifact is None:
            return
        # A manifest that cannot be read may name any blob: _read raises, and nothing is removed.
        rest = in_parallel(
            lambda ref: self._read(*ref), find_refs(self._backend, None), REQUESTS_AT_ONCE
        )
        kept = {entry.sha256 for other in rest for entry in other.files}
        going = {entry.sha256 for entry in artifact.files} - kept
        in_parallel(lambda sha: self._backend.delete(blob_key(sha)), going, REQUESTS_AT_ONCE)

    # Records

    def write_record(self, path: str, value: Mapping[str, Any], *, create: bool = False) -> bool:
        """Write JSON, replacing what is there. With ``create`` only if nothing is: exactly one of
        several racing callers gets True."""
        return records.write_record(self._backend, path, value, create)

    def read_record(self, path: str) -> dict[str, Any] | None:
        """A record, or None when there is none. Raises ArtifactCorrupt when it is not JSON."""
        return records.read_record(self._backend, path)

    def list_records(self, prefix: str) -> builtins.list[str]:
        """Paths of the records that start with a prefix such as ``runs/``, sorted."""
        return records.list_records(self._backend, prefix)

    def delete_record(self, path: str) -> None:
        """Remove a record; nothing happens when there is none."""
        self._backend.delete(records.record_key(path))

    def stage_result(self, key: str) -> Artifact | None:
        """The complete artifact that a stage key stands for; None when the stage must run."""
        return stages.stage_result(self._backend, key, self._read)

    def commit_stage(self, key: str, artifact: Artifact) -> Artifact:
        """Make an artifact a stage's result; the winner's artifact when another was first."""
        return stages.commit_stage(self._backend, key, artifact, self._read)

    # The store itself

    def scoped(self, prefix: str) -> Store:
        """The same layout below a prefix, with blobs of its own."""
        return Store(self._backend.within(check_path(prefix.strip("/"))))

    def find_garbage(self, roots: Roots, limits: Limits) -> Garbage:
        """What `collect` would delete now: artifacts that none of ``roots`` (digests) reaches by
        its parents, files that no kept artifact names, and what killed writers left."""
        return find_garbage(self._backend, roots, limits)

    def collect(self, roots: Roots, limits: Limits) -> Garbage:
        """Delete the garbage, and return what it was. Safe beside anyone who publishes, reuses a
        stage's result or writes checkpoints; ``roots`` is called once nobody can start to."""
        found = collect(self._backend, roots, limits)
        self._artifacts.clear()
        return found

    def sweep(self, older_than: float = 86_400) -> int:
        """Remove what killed uploads left more than so many seconds ago; how many it was."""
        return self._backend.sweep(older_than)

    def ping(self) -> None:
        """Raise StoreUnavailable, within about 15 seconds, when the place does not answer, refuses
        the key or is not there. Only reads."""
        self._backend.impatient().keys("probes/")

    def check(self) -> None:
        """Write, read and delete a probe, within about 15 seconds.

        Raises StoreUnavailable, naming the place and the setting to correct.
        """
        backend = self._backend.impatient()
        key, data = f"probes/{uuid.uuid4().hex}", b"rlhf"
        created = backend.create(key, data)  # nothing to remove when this fails
        try:
            again = backend.create(key, b"second")
            if not created or again or backend.read(key) != data:
                raise StoreUnavailable(
                    f"{self.url} does not keep its first writer's value (If-None-Match is ignored "
                    "or reads are stale); needed is a store with conditional writes, such as AWS "
                    "S3, MinIO, Ceph or SeaweedFS"
                )
            backend.keys("probes/")
        finally:
            backend.delete(key)
