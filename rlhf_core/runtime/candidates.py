"""The last good policy of a stage that failed: how its ranks tell whoever waits for the stage.

    candidates/<stage key>.json   {"kind", "digest"} of an artifact that is not the stage's result

Ranks and orchestrator share the store, wherever the ranks run. No torch in here.
"""

from __future__ import annotations

from rlhf_core.errors import ArtifactNotFound
from rlhf_core.store import Artifact, Store


def note(store: Store, key: str, artifact: Artifact | None) -> None:
    """What is left of the stage now; None: nothing, whatever an earlier attempt left."""
    if artifact is not None:
        store.write_record(_path(key), {"kind": artifact.kind, "digest": artifact.digest})
    elif store.read_record(_path(key)) is not None:
        store.delete_record(_path(key))


def noted(store: Store, key: str) -> Artifact | None:
    """What the stage's last failure left."""
    record = store.read_record(_path(key))
    try:
        return store.get(f"{record['kind']}/{record['digest']}") if record else None
    except ArtifactNotFound:
        return None


def _path(key: str) -> str:
    return f"candidates/{key}.json"
