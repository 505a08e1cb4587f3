"""Small JSON records in the store: stage results, runs, model versions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rlhf_core.errors import ArtifactCorrupt, ConfigError
from rlhf_core.store.artifact import check_path, plain_json
from rlhf_core.store.backend import Backend

_RESERVED = {"blobs", "artifacts", "leases", "gc", ".tmp"}


def record_key(path: str) -> str:
    """The key of a record. Raises ConfigError unless it is ``<folder>/…/<name>.json``."""
    parts = check_path(path).split("/")
    if len(parts) < 2 or not path.endswith(".json") or _RESERVED & set(parts):
        raise ConfigError(
            f"record path {path!r} is invalid; expected one like 'runs/2024-05-01.json', in a "
            f"folder other than {', '.join(sorted(_RESERVED))}"
        )
    return path


def write_record(backend: Backend, path: str, value: Mapping[str, Any], create: bool) -> bool:
    """See `Store.write_record`."""
    key = record_key(path)
    text = json.dumps(plain_json(value, f"record {path}"), indent=1, sort_keys=True)
    if create:
        return backend.create(key, text.encode())
    backend.write(key, text.encode())
    return True


def read_record(backend: Backend, path: str) -> dict[str, Any] | None:
    """See `Store.read_record`."""
    data = backend.read(record_key(path))
    if data is None:
        return None
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ArtifactCorrupt(
            f"record {path} in {backend.url} is not JSON ({error}); delete it and write it again"
        ) from error
    if not isinstance(value, dict):
        raise ArtifactCorrupt(
            f"record {path} in {backend.url} holds a {type(value).__name__} instead of an object; "
            "delete it and write it again"
        )
    return value


def list_records(backend: Backend, prefix: str) -> list[str]:
    """See `Store.list_records`."""
    check_path(prefix.rstrip("/"))
    keys = backend.keys(prefix)
    return [k for k in keys if k.endswith(".json") and not _RESERVED & set(k.split("/"))]
