"""Reads the files of an artifact that reports are made of. A file may be missing."""

from __future__ import annotations

import json
from typing import Any

from rlhf_core.errors import ConfigError, StoreError
from rlhf_core.store import Store


def read_json(store: Store, digest: str, path: str) -> dict[str, Any]:
    """The JSON object in a file; {} when the artifact has none.

    Raises:
        StoreError: the store cannot be read; a verdict without these numbers would be too good.
    """
    try:
        value = json.loads(store.read_bytes(digest, path))
    except (ConfigError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_lines(store: Store, digest: str, path: str) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines; [] when it cannot be read."""
    try:
        text = store.read_bytes(digest, path).decode()
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ConfigError, StoreError, ValueError):
        return []
