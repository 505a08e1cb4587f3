"""Small JSON records in the store: stage results, runs, model versions."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from rlhf_core.errors import ArtifactCorrupt, ConfigError
from rlhf_core.store.artifact import check_path, plain_json
from rlhf_core.store.backend import Backend

log = logging.getLogger("rlhf_core.store")

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


def read_record(backend: Backend, path: str, strict: bool = False) -> dict[str, Any] | None:
    """See `Store.read_record`."""
    data = backend.read(record_key(path))
    if data is None:
        return None
    value, problem = parse_record(data)
    if not problem:
        return value
    if strict:
        raise ArtifactCorrupt(f"record {path} in {backend.url} cannot be read: {problem}")
    log.warning("record %s in %s counts as not there: %s", path, backend.url, problem)
    return None


def parse_record(data: bytes) -> tuple[dict[str, Any], str]:
    """The value of a record, and why it cannot be read; "" if it can."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        return {}, "it is empty" if not data else f"it is not JSON ({error})"
    if not isinstance(value, dict):
        return {}, f"it holds a {type(value).__name__} instead of an object"
    return value, ""


def model_problem(record: Mapping[str, Any]) -> str:
    """Why a record of a model's log cannot be used; "" if it can."""
    if not record.keys() & {"digest", "versions"}:
        return "it names no artifact"
    kinds = {"digest": str, "order": int, "champion": str, "taken": str}
    wrong = [k for k, kind in kinds.items() if k in record and not isinstance(record[k], kind)]
    return f"its {wrong[0]} is a {type(record[wrong[0]]).__name__}" if wrong else ""


def list_records(backend: Backend, prefix: str) -> list[str]:
    """See `Store.list_records`."""
    check_path(prefix.rstrip("/"))
    keys = backend.keys(prefix)
    return [k for k in keys if k.endswith(".json") and not _RESERVED & set(k.split("/"))]
