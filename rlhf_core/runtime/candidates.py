"""The last good policy of a stage that failed: a record that its ranks leave for the orchestrator.

    candidates/<stage key>.json   {"kind", "digest"} of an artifact that is not the stage's result

Ranks and orchestrator share the store, wherever the ranks run. Does not import torch.
"""

from __future__ import annotations

from rlhf_core.errors import ArtifactCorrupt, ArtifactNotFound
from rlhf_core.store import Artifact, Store


def write(store: Store, key: str, artifact: Artifact | None) -> None:
    """Record the policy that the stage has left; None removes the record of an earlier attempt."""
    if artifact is not None:
        store.write_record(_path(key), {"kind": artifact.kind, "digest": artifact.digest})
    else:
        store.delete_record(_path(key))


def read(store: Store, key: str) -> Artifact | None:
    """The policy that the stage's last failed attempt left; None if there is none, or it is
    damaged."""
    record = store.read_record(_path(key))
    try:
        return store.get(f"{record['kind']}/{record['digest']}") if record else None
    except (ArtifactNotFound, ArtifactCorrupt, KeyError):
        return None


def _path(key: str) -> str:
    return f"candidates/{key}.json"
