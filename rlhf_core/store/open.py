"""Opens a store by its URL."""

from __future__ import annotations

import os
import re
from pathlib import Path

from rlhf_core.errors import ConfigError
from rlhf_core.store.artifact import check_path
from rlhf_core.store.backend import Backend
from rlhf_core.store.local import LocalBackend
from rlhf_core.store.settings import StoreSettings, read_settings
from rlhf_core.store.store import Store
from rlhf_core.system.home import rlhf_home

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_BUCKET = re.compile(r"[a-z0-9A-Z][a-zA-Z0-9._-]{1,254}")


def open_store(url: str | None = None, settings: StoreSettings | None = None) -> Store:
    """The store at ``file://<folder>``, a plain path, or ``s3://<bucket>[/<prefix>]``.

    It contacts no server; `Store.check` does.

    Args:
        url: None: ``$RLHF_STORE``, else ``file://<rlhf_home()>/store``.
        settings: for S3; None: those of the environment.

    Raises:
        ConfigError: another kind of URL, or invalid settings.
    """
    url = url or os.environ.get("RLHF_STORE") or f"file://{rlhf_home() / 'store'}"
    match = _SCHEME.fullmatch(url)
    scheme, rest = (match[1].lower(), match[2]) if match else ("file", url)
    backend: Backend
    if scheme == "file":
        if not rest.strip():
            raise ConfigError(f"store URL {url!r} names no folder; use file:///path/to/folder")
        try:
            backend = LocalBackend(Path(os.path.abspath(Path(rest).expanduser())))
        except RuntimeError as error:
            raise ConfigError(f"store URL {url!r}: {error} Give the whole path.") from error
    elif scheme == "s3":
        bucket, _, prefix = rest.partition("/")
        if "@" in bucket or ":" in bucket:
            raise ConfigError(
                "an s3:// URL names the bucket first, without keys or a host; put keys into "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, the host into RLHF_STORE_ENDPOINT"
            )
        if not _BUCKET.fullmatch(bucket):
            raise ConfigError(f"store URL {url!r} names no bucket; use s3://bucket/prefix")
        from rlhf_core.store.s3.backend import S3Backend
        from rlhf_core.store.s3.client import S3Client

        prefix = check_path(prefix.strip("/")) if prefix.strip("/") else ""
        backend = S3Backend(S3Client(bucket, settings or read_settings()), prefix)
    else:
        raise ConfigError(
            f"store URL scheme {scheme!r} is not supported; use file:///path/to/folder or "
            "s3://bucket/prefix"
        )
    return Store(backend)
