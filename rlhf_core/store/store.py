"""The artifact store: blobs named by their content, and manifests that publish sets of them.

Layout:
    blobs/sha256/ab/<sha256>                      never changes
    artifacts/<kind>/<digest>/manifest.json       written last, created once
    stages/<key>.json, runs/…, models/…           small JSON records
    leases/…, gc/…                                of writers and a collector, see `leases`
    <prefix>/…                                    the same layout, for a scoped store
"""

from __future__ import annotations

import builtins
import logging
from collections.abc import Container, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rlhf_core.errors import ArtifactNotFound, StoreError, StoreUnavailable
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
from rlhf_core.store.collect import Garbage, Limits, Roots, collect, find_garbage
from rlhf_core.store.deletion import delete_alone, delete_artifact
from rlhf_core.store.folders import fetch_cached, fetch_to, walk
from rlhf_core.store.integrity import check_access, read_verified, verify
from rlhf_core.store.parallel import REQUESTS_AT_ONCE, in_parallel
from rlhf_core.store.publishing import holding, publish, upload
from rlhf_core.store.refs import find_refs, lineage, manifest_key, resolve
from rlhf_core.store.repair import Damage, find_damage, repair
from rlhf_core.system.home import rlhf_home

log = logging.getLogger("rlhf_core.store")


class Store:
    """Artifacts and records at one URL. Safe to use from threads, and after a fork.

    Every method raises StoreUnavailable if the storage cannot be reached, denies access or is full,
    StoreError if it fails otherwise, and ConfigError for invalid arguments.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._artifacts: dict[str, Artifact] = {}

    @property
    def url(self) -> str:
        """The URL, without credentials."""
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
        """Publish all files below a folder; files that the store has are not uploaded again.

        Publishing the same files, kind, metadata and parents again returns the existing artifact.

        Args:
            kind: a slug, such as "model".
            metadata: plain JSON.
            parents: digests of the artifacts that it was made from.

        Raises:
            ConfigError: a symbolic link, or an empty folder.
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
        """Publish files by their path in the artifact; else as `publish`.

        Args:
            files: path -> local file, bytes, or the entry of an artifact in this store, whose
                content is reused without an upload.
        """
        return publish(self._backend, kind, files, metadata, parents)

    def upload(self, files: Mapping[str, Path | bytes]) -> builtins.list[FileEntry]:
        """Upload files that another process publishes by their entries; again where that fails."""
        return upload(self._backend, files)

    # Artifacts: reading

    def get(self, ref: str) -> Artifact:
        """The artifact of a reference.

        Args:
            ref: a digest, the start of one (at least 6 digits), or ``kind/start``.

        Raises:
            ArtifactNotFound: no artifact matches; the text names close ones.
            ConfigError: several artifacts match.
            ArtifactCorrupt: its manifest is damaged.
        """
        return self._read(*self.resolve(ref))

    def resolve(self, ref: str) -> tuple[str, str]:
        """Kind and digest of a reference, whose manifest may be damaged. Raises as `get`."""
        return resolve(self._backend, ref)

    def _read(self, kind: str, digest: str) -> Artifact:
        # A record could hold anything, even a path that leads out of the store.
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
        """All artifacts, newest first; those with a damaged manifest are skipped with a warning."""

        def read(ref: tuple[str, str]) -> Artifact | None:
            try:
                return self._artifacts.get(ref[1]) or self._read(*ref)
            except ArtifactNotFound:
                return None  # deleted since it was listed
            except StoreUnavailable:
                raise
            except StoreError as error:
                log.warning("not listed: %s", error)
                return None

        refs = find_refs(self._backend, kind if kind is None else check_kind(kind))
        found = in_parallel(read, refs, REQUESTS_AT_ONCE)
        return sorted(
            (artifact for artifact in found if artifact is not None),
            key=lambda artifact: (artifact.created, artifact.digest),
            reverse=True,
        )

    def lineage(self, digest: str) -> dict[str, Artifact | None]:
        """An artifact and all its ancestors by digest; None for a missing or damaged one."""
        return lineage(self._backend, digest, self._read)

    def fetch(
        self, ref: str, destination: Path | None = None, only: Container[str] | None = None
    ) -> Path:
        """Fetch the artifact's files into a local folder, each verified against its sha256.

        Args:
            destination: a new or empty folder, or one with exactly this artifact; it appears
                complete or not at all. None: a read-only folder in the cache below ``rlhf_home()``,
                which all processes of a machine share; they wait for one download.
            only: paths of the files to fetch into a destination; None: all.

        Raises:
            ArtifactCorrupt: the stored bytes do not match the manifest.
        """
        artifact = self.get(ref)
        if destination is None:
            return fetch_cached(self._backend, artifact)
        return fetch_to(self._backend, artifact.with_files(only), Path(destination))

    def read_bytes(self, ref: str, path: str) -> bytes:
        """The verified bytes of one file.

        Raises:
            ConfigError: the artifact has no such file.
            ArtifactCorrupt: the stored bytes do not match the manifest.
        """
        return read_verified(self._backend, self.get(ref), path)

    def verify(self, ref: str) -> builtins.list[str]:
        """Read every blob of an artifact; returns the problems, one text each."""
        return verify(self._backend, self.get(ref))

    def find_damage(self) -> builtins.list[Damage]:
        """Read the whole store; returns what is damaged or missing, checkpoints included."""
        return find_damage(self._backend)

    def repair(
        self, damage: builtins.list[Damage], folders: Sequence[Path] = (), *, lost: bool = False
    ) -> builtins.list[Damage]:
        """Heal what `find_damage` found, and clear the rest away, so that stages run again.

        Args:
            folders: are searched for good copies, after this machine's cache and published folders.
            lost: clear away what the server cannot read; not while a part of it is down.

        Returns:
            The damage, with what was done about it.
        """
        own = [rlhf_home() / "cache" / "artifacts", rlhf_home() / "published"]
        done = repair(self._backend, damage, [*own, *folders], lost)
        self._artifacts.clear()
        return done

    def holding(self, ref: str) -> AbstractContextManager[Artifact]:
        """The complete artifact, protected from a collector until the block ends.

        Use it while writing a record that names the artifact.

        Raises:
            ArtifactNotFound: there is no such artifact.
            ArtifactCorrupt: files are missing.
        """
        return holding(self._backend, self.get(ref))

    def delete_unused(self, digest: str, grace: float) -> Garbage:
        """Delete an artifact beside others that publish; see `deletion.delete_artifact`.

        Raises:
            ArtifactNotFound: there is no such artifact.
        """
        _, digest = self.resolve(digest)
        self._artifacts.pop(digest, None)
        return delete_artifact(self._backend, digest, grace)

    def delete(self, digest: str, *, blobs: bool = False) -> None:
        """Remove an artifact.

        Args:
            blobs: remove its blobs too, unless another artifact of this (or this scoped) store
                names them. Nobody may publish to the store meanwhile, since a publisher could reuse
                a blob that is about to be deleted.

        Raises:
            ArtifactNotFound: there is no such artifact.
        """
        kind, digest = self.resolve(digest)
        self._artifacts.pop(digest, None)
        delete_alone(self._backend, kind, digest, self._read, blobs)

    # Records

    def write_record(self, path: str, value: Mapping[str, Any], *, create: bool = False) -> bool:
        """Write a JSON record.

        Args:
            path: ``<folder>/…/<name>.json``.
            create: write only if there is no record yet; exactly one of several racing callers
                gets True. Otherwise an existing record is replaced.
        """
        return records.write_record(self._backend, path, value, create)

    def read_record(self, path: str, *, strict: bool = False) -> dict[str, Any] | None:
        """A record; None if there is none, or (with a warning) none that can be read.

        Args:
            strict: raise ArtifactCorrupt for one that cannot be read.
        """
        return records.read_record(self._backend, path, strict)

    def list_records(self, prefix: str) -> builtins.list[str]:
        """Paths of the records that start with a prefix such as ``runs/``, sorted."""
        return records.list_records(self._backend, prefix)

    def delete_record(self, path: str) -> None:
        """Remove a record, if there is one."""
        self._backend.delete(records.record_key(path))

    def stage_result(self, key: str) -> Artifact | None:
        """The complete result of a stage key; None if the stage must run."""
        return stages.stage_result(self._backend, key, self._read)

    def commit_stage(
        self, key: str, artifact: Artifact, work: Mapping[str, Any] | None = None
    ) -> Artifact:
        """Record an artifact as a stage's result; returns the winner's if another was faster.

        Args:
            work: what making it took, which `stage_work` returns; no part of the artifact.
        """
        return stages.commit_stage(self._backend, key, artifact, work or {}, self._read)

    def stage_work(self, key: str) -> dict[str, Any]:
        """What making a stage's result took, see `rlhf_core.runtime.work`; {} if not known."""
        return stages.stage_work(self._backend, key)

    # The store itself

    def scoped(self, prefix: str) -> Store:
        """The same layout below a prefix, with blobs of its own."""
        return Store(self._backend.scoped(check_path(prefix.strip("/"))))

    def find_garbage(self, roots: Roots, limits: Limits) -> Garbage:
        """What `collect` would delete now. Arguments as for `collect`."""
        return find_garbage(self._backend, roots, limits)

    def collect(self, roots: Roots, limits: Limits) -> Garbage:
        """Delete the garbage and return it.

        Garbage are artifacts that no root reaches through its parents, files that no kept artifact
        names, and leftovers of killed writers. Others may publish, reuse stage results and write
        checkpoints at the same time.

        Args:
            roots: returns the digests to keep; called once no new writer can start.
            limits: ages below which nothing is deleted.
        """
        found = collect(self._backend, roots, limits)
        self._artifacts.clear()
        return found

    def sweep(self, older_than: float = 86_400) -> int:
        """Remove unfinished uploads older than so many seconds; returns their number."""
        return self._backend.sweep(older_than)

    def ping(self) -> None:
        """Check by reading, within about 15 seconds, that the storage can be used.

        Raises:
            StoreUnavailable: it does not answer, denies access or does not exist.
        """
        self._backend.with_short_timeouts().keys("probes/")

    def check(self) -> None:
        """Write, read and delete a probe, within about 15 seconds.

        Raises:
            StoreUnavailable: this failed; the text names the URL and the setting to correct.
        """
        check_access(self._backend.with_short_timeouts())
