"""Deletes one artifact: in a scope of its own, or beside others that publish."""

from __future__ import annotations

import logging
from collections.abc import Callable

from rlhf_core.errors import ArtifactCorrupt, ArtifactNotFound, StoreError
from rlhf_core.store.artifact import Artifact
from rlhf_core.store.backend import Backend
from rlhf_core.store.blobs import blob_key
from rlhf_core.store.collect import Garbage, Limits, delete_all, list_all, named_files, ref_of
from rlhf_core.store.leases import CollectionFlag
from rlhf_core.store.parallel import REQUESTS_AT_ONCE, in_parallel
from rlhf_core.store.refs import find_refs, manifest_key

log = logging.getLogger("rlhf_core.store")


def delete_alone(
    backend: Backend, kind: str, digest: str, read: Callable[[str, str], Artifact], blobs: bool
) -> None:
    """See `Store.delete`. ``read`` returns the artifact of a kind and digest."""
    artifact = None
    try:
        artifact = read(kind, digest)
    except ArtifactCorrupt as error:
        log.warning("deleting %s/%s without its blobs: %s", kind, digest[:12], error)
    backend.delete(manifest_key(kind, digest))
    if not blobs or artifact is None:
        return
    try:
        rest = in_parallel(lambda ref: read(*ref), find_refs(backend, None), REQUESTS_AT_ONCE)
    except ArtifactCorrupt as error:  # it may name any blob
        log.warning("the files of %s/%s stay: %s", kind, digest[:12], error)
        return
    kept = {entry.sha256 for other in rest for entry in other.files}
    going = {entry.sha256 for entry in artifact.files} - kept
    backend.settle([manifest_key(kind, digest)])
    in_parallel(lambda sha: backend.delete(blob_key(sha)), going, REQUESTS_AT_ONCE)


def delete_artifact(backend: Backend, digest: str, grace: float) -> Garbage:
    """Delete one artifact, and its files that no other one names and that are old enough.

    Args:
        grace: seconds; younger files stay for a collection, since a writer may need them.

    Raises:
        ArtifactNotFound: there is none.
        StoreError: a writer has announced that it uses the artifact.
    """
    limits = Limits(keep=grace, grace=grace)
    with CollectionFlag(backend) as flag:
        listing = list_all(backend, set, limits, backend.now())
        if any(value.get("artifact") == digest for value in listing.leased):
            raise StoreError(
                f"a writer is publishing the artifact {digest[:12]}, or is writing a record that "
                "names it; try again when it has ended"
            )
        if digest not in listing.manifests:
            raise ArtifactNotFound(f"artifact {digest[:12]} is not in {backend.url}")
        artifact = listing.artifacts.pop(digest, None)
        manifest = listing.manifests.pop(digest)
        garbage = Garbage([(ref_of(manifest), artifact.created if artifact else "")], [manifest])
        if artifact and listing.manifests.keys() == listing.artifacts.keys():
            named = named_files(listing, listing.artifacts.values())
            for sha256 in {entry.sha256 for entry in artifact.files} - named:
                blobs = backend.entries(blob_key(sha256))
                garbage.blobs += [entry for entry in blobs if listing.older(entry, grace)]
        delete_all(backend, garbage, flag)
    return garbage
