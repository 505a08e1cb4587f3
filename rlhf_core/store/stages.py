"""Stage records: map a stage key to the artifact that is its result, and to what making it took."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from rlhf_core.errors import ArtifactCorrupt, ArtifactNotFound
from rlhf_core.store.artifact import Artifact
from rlhf_core.store.backend import Backend
from rlhf_core.store.leases import wait_for_collector
from rlhf_core.store.publishing import incomplete
from rlhf_core.store.records import read_record, write_record
from rlhf_core.store.refs import manifest_key

log = logging.getLogger("rlhf_core.store")


def _path(key: str) -> str:
    return f"stages/{key}.json"


def stage_result(
    backend: Backend, key: str, read: Callable[[str, str], Artifact]
) -> Artifact | None:
    """See `Store.stage_result`. ``read`` returns the artifact of a kind and digest."""
    record = read_record(backend, _path(key))
    if record is None:
        return None
    try:
        artifact = read(record["kind"], record["digest"])
    except ArtifactNotFound:
        return None
    except ArtifactCorrupt as error:
        log.warning("stage %s counts as not done: %s", key, error)
        return None
    except KeyError:
        log.warning("stage record %s names no artifact; the stage counts as not done", key)
        return None
    # Rewritten unchanged: its new age protects the reused artifact from a collector.
    write_record(backend, _path(key), record, create=False)
    wait_for_collector(backend)
    if backend.size(manifest_key(artifact.kind, artifact.digest)) is None:
        return None
    if missing := incomplete(backend, artifact):
        log.warning("stage %s counts as not done, %s lost files: %s", key, artifact.ref, missing)
        return None
    return artifact


def stage_work(backend: Backend, key: str) -> dict[str, Any]:
    """See `Store.stage_work`."""
    found = (read_record(backend, _path(key)) or {}).get("work")
    return found if isinstance(found, dict) else {}


def commit_stage(
    backend: Backend,
    key: str,
    artifact: Artifact,
    work: Mapping[str, Any],
    read: Callable[[str, str], Artifact],
) -> Artifact:
    """See `Store.commit_stage`."""
    record: dict[str, Any] = {"kind": artifact.kind, "digest": artifact.digest}
    if work:
        record["work"] = dict(work)
    if write_record(backend, _path(key), record, create=True):
        return artifact
    winner = stage_result(backend, key, read)
    if winner is not None:
        return winner
    # The winner's artifact is gone, so this one takes its place.
    write_record(backend, _path(key), record, create=False)
    return artifact
