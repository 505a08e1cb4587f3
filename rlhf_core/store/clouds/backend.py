"""The backend for Google Cloud Storage and Azure Blob Storage, through obstore."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf_core.store.backend import Entry
from rlhf_core.store.clouds.client import PART, TRANSFERS_AT_ONCE, CloudClient
from rlhf_core.store.local import file_errors
from rlhf_core.store.s3.parts import download_parts

MAX_PARTS = 10_000
PARTS_AT_ONCE = 2  # of one file's upload


class CloudBackend:
    """Keys are objects below ``prefix`` in a bucket or container."""

    remote = True

    def __init__(self, client: CloudClient, prefix: str) -> None:
        self.client = client
        self.prefix = prefix.strip("/")
        self.url = f"{client.scheme}://{client.bucket}/{self.prefix}".rstrip("/")

    def size(self, key: str) -> int | None:
        name = self._key(key)
        found = self.client.request(
            "reading", lambda c: c.obstore.head(c.store, name)["size"], missing=None
        )
        return None if found is None else int(found)

    def read(self, key: str) -> bytes | None:
        name = self._key(key)
        return self.client.request(
            "reading", lambda c: bytes(c.obstore.get(c.store, name).bytes()), missing=None
        )

    def write(self, key: str, data: bytes) -> None:
        self._put(key, data, replace=True)

    def create(self, key: str, data: bytes) -> bool:
        return self._put(key, data, replace=False)

    def upload(self, source: Path, key: str, size: int, *, replace: bool) -> None:
        with file_errors(source), open(source, "rb") as file:
            if size <= PART:
                with self.client.slots:
                    self._put(key, file.read(), replace=replace)
                return
            # An upload in parts cannot be conditional. Racing writers of a blob send equal bytes,
            # and each upload is seen whole or not at all.
            if not replace and self.size(key) is not None:
                return
            name, step = self._key(key), max(PART, -(-size // MAX_PARTS))
            self.client.request(
                "uploading",
                lambda c: c.obstore.put(
                    c.patient, name, file, use_multipart=True, chunk_size=step,
                    max_concurrency=PARTS_AT_ONCE,
                ),
                retries=0,
            )  # fmt: skip

    def settle(self, keys: Iterable[str]) -> None:
        """Nothing to do: a service's reply promises that the value is kept."""

    def download(self, key: str, destination: Path, size: int) -> str | None:
        with file_errors(destination):
            if size == 0:
                data = self.read(key)
                if data is not None:
                    destination.write_bytes(data)
                return None if data is None else hashlib.sha256(data).hexdigest()

            def fetch(descriptor: int, start: int, end: int) -> bool:
                with self.client.slots:
                    data = self._range(key, start, end)
                    if data is not None:
                        os.pwrite(descriptor, data, start)
                return data is not None

            return download_parts(destination, size, PART, TRANSFERS_AT_ONCE, fetch)

    def chunks(self, key: str, size: int) -> Iterator[bytes]:
        for start in range(0, size, PART):
            data = self._range(key, start, min(start + PART, size))
            if not data:
                return
            yield data

    def keys(self, prefix: str) -> list[str]:
        return [entry.key for entry in self.entries(prefix)]

    def entries(self, prefix: str) -> list[Entry]:
        # obstore lists whole folders only.
        folder, cut = self._key(prefix.rpartition("/")[0]).rstrip("/"), len(self._key(""))
        listed = self.client.request(
            "listing", lambda c: c.obstore.list(c.store, folder or None).collect()
        )
        found = [
            Entry(item["path"][cut:], int(item["size"]), item["last_modified"].timestamp())
            for item in listed
            if item["path"][cut:].startswith(prefix)
        ]
        return sorted(found, key=lambda entry: entry.key)

    def folders(self, prefix: str) -> list[str]:
        base = self._key(prefix.strip("/")).rstrip("/")
        listed = self.client.request(
            "listing", lambda c: c.obstore.list_with_delimiter(c.store, base or None)
        )
        return sorted(path.rstrip("/").rpartition("/")[2] for path in listed["common_prefixes"])

    def delete(self, key: str) -> None:
        name = self._key(key)
        self.client.request("deleting", lambda c: c.obstore.delete(c.store, name), missing=None)

    def now(self) -> float:
        return self.client.server_time()

    def free_reserve(self) -> None:
        """Nothing to do: what a service keeps for itself is its own matter."""

    def sweep(self, older_than: float) -> int:
        """0: Azure drops unfinished uploads after a week, Google by a rule of the bucket."""
        return 0

    def scoped(self, prefix: str) -> CloudBackend:
        return CloudBackend(self.client, self._key(prefix))

    def with_short_timeouts(self) -> CloudBackend:
        client = self.client
        quick = CloudClient(client.scheme, client.bucket, client.settings.with_short_timeouts())
        return CloudBackend(quick, self.prefix)

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _put(self, key: str, data: bytes, *, replace: bool) -> bool:
        name, mode, tries = self._key(key), "overwrite" if replace else "create", list[int]()
        reply = self.client.request(
            "writing",
            lambda c: c.obstore.put(c.store, name, data, mode=mode, use_multipart=False),
            tries=tries,
            conflict=None,
        )
        if reply is None and len(tries) > 1:
            # The first try may have succeeded, with only its reply lost.
            return self.read(key) == data
        return reply is not None

    def _range(self, key: str, start: int, end: int) -> Any:
        """Some bytes; None if there is no such key, b"" if the value ends before ``start``."""
        name = self._key(key)
        return self.client.request(
            "reading",
            lambda c: bytes(c.obstore.get_range(c.store, name, start=start, end=end)),
            missing=None,
            past_end=b"",
        )
