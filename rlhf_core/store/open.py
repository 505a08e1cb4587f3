"""Opens a store by its URL."""

from __future__ import annotations

import os
import re
from pathlib import Path

from rlhf_core.errors import ConfigError
from rlhf_core.store.artifact import check_path
from rlhf_core.store.backend import Backend
from rlhf_core.store.clouds.cloud import CLOUDS
from rlhf_core.store.local import LocalBackend
from rlhf_core.store.settings import StoreSettings, read_settings
from rlhf_core.store.store import Store
from rlhf_core.system.home import rlhf_home

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
# Where keys and hosts are given instead of in the URL.
_ELSEWHERE = {
    "s3": "put keys into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, the host into "
    "RLHF_STORE_ENDPOINT",
    "gs": "name the file with the key in GOOGLE_APPLICATION_CREDENTIALS",
    "az": "put the account into AZURE_STORAGE_ACCOUNT_NAME, its key into AZURE_STORAGE_ACCOUNT_KEY",
}
_BUCKET = re.compile(r"[a-z0-9A-Z][a-zA-Z0-9._-]{1,254}")


def open_store(url: str | None = None, settings: StoreSettings | None = None) -> Store:
    """The store at ``file://<folder>``, a plain path, ``s3://<bucket>[/<prefix>]``,
    ``gs://<bucket>[/<prefix>]`` or ``az://<container>[/<prefix>]``.

    It contacts no server; `Store.check` does.

    Args:
        url: None: ``$RLHF_STORE``, else ``file://<rlhf_home()>/store``.
        settings: of a remote store; None: those of the environment.

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
    elif scheme in ("s3", *CLOUDS):
        backend = _remote(url, scheme, rest, settings or read_settings())
    else:
        raise ConfigError(
            f"store URL scheme {scheme!r} is not supported; use file:///path/to/folder, "
            "s3://bucket/prefix, gs://bucket/prefix or az://container/prefix"
        )
    return Store(backend)


def _remote(url: str, scheme: str, rest: str, settings: StoreSettings) -> Backend:
    """The backend of a bucket, whose library is imported only here."""
    bucket, _, prefix = rest.partition("/")
    place = CLOUDS[scheme].place if scheme in CLOUDS else "bucket"
    if "@" in bucket or ":" in bucket:
        raise ConfigError(
            f"an {scheme}:// URL names the {place} first, without keys or a host; "
            + _ELSEWHERE[scheme]
        )
    if not _BUCKET.fullmatch(bucket):
        raise ConfigError(f"store URL {url!r} names no {place}; use {scheme}://{place}/prefix")
    prefix = check_path(prefix.strip("/")) if prefix.strip("/") else ""
    if scheme == "s3":
        from rlhf_core.store.s3.backend import S3Backend
        from rlhf_core.store.s3.client import S3Client

        return S3Backend(S3Client(bucket, settings), prefix)
    from rlhf_core.store.clouds.backend import CloudBackend
    from rlhf_core.store.clouds.client import CloudClient

    return CloudBackend(CloudClient(scheme, bucket, settings), prefix)
