"""The backend for S3 and compatible servers."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterable, Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from rlhf_core.errors import ObjectUnreadable, StoreUnavailable
from rlhf_core.store.backend import Entry
from rlhf_core.store.local import file_errors
from rlhf_core.store.parallel import in_parallel
from rlhf_core.store.s3.client import TRANSFERS_AT_ONCE, S3Client
from rlhf_core.store.s3.errors import code_of, status_of
from rlhf_core.store.s3.parts import FileRegion, FileSlice, download_parts, md5

log = logging.getLogger("rlhf_core.store")

PART = 16 * 2**20
MAX_PARTS = 10_000


class S3Backend:
    """Keys are objects below ``prefix`` in ``bucket``."""

    remote = True

    def __init__(self, client: S3Client, prefix: str) -> None:
        self.client = client
        self.prefix = prefix.strip("/")
        self.url = f"s3://{client.bucket}/{self.prefix}".rstrip("/")

    def size(self, key: str) -> int | None:
        reply = self.client.request("head_object", "reading", missing=None, Key=self._key(key))
        return None if reply is None else int(reply["ContentLength"])

    def read(self, key: str) -> bytes | None:
        reply = self._get(key)
        return None if reply is None else bytes(reply["Body"])

    def write(self, key: str, data: bytes) -> None:
        self._put(key, data, replace=True)

    def create(self, key: str, data: bytes) -> bool:
        return self._put(key, data, replace=False)

    def upload(self, source: Path, key: str, size: int, *, replace: bool) -> None:
        with file_errors(source), open(source, "rb") as file:
            if size <= 2 * PART:
                with self.client.slots:
                    body = self._file_slice(file.fileno(), 0, size) if size else b""
                    self._put(key, body, replace=replace)
            else:
                self._upload_parts(file.fileno(), key, size, replace)

    def settle(self, keys: Iterable[str]) -> None:
        """Nothing to do: a server's reply promises as much as the server can hold."""

    def download(self, key: str, destination: Path, size: int) -> str | None:
        with file_errors(destination):
            if size == 0:
                data = self.read(key)
                if data is not None:
                    destination.write_bytes(data)
                return None if data is None else hashlib.sha256(data).hexdigest()

            def fetch(descriptor: int, start: int, end: int) -> bool:
                with self.client.slots:
                    into = FileRegion(descriptor, start, end - start, self._patience)
                    return self._range(key, start, end, into) is not None

            return download_parts(destination, size, PART, TRANSFERS_AT_ONCE, fetch)

    def chunks(self, key: str, size: int) -> Iterator[bytes]:
        for start in range(0, size, PART):
            reply = self._range(key, start, min(start + PART, size))
            if not reply:
                return
            yield reply["Body"]

    def keys(self, prefix: str) -> list[str]:
        return [entry.key for entry in self.entries(prefix)]

    def entries(self, prefix: str) -> list[Entry]:
        cut = len(self._key(""))
        found = [
            Entry(item["Key"][cut:], int(item["Size"]), item["LastModified"].timestamp())
            for page in self._pages(prefix)
            for item in page[0]
        ]
        return sorted(found, key=lambda entry: entry.key)

    def folders(self, prefix: str) -> list[str]:
        base = self._key(prefix.rstrip("/") + "/")
        pages = self._pages(prefix.rstrip("/") + "/", Delimiter="/")
        return sorted(item["Prefix"][len(base) : -1] for page in pages for item in page[1])

    def delete(self, key: str) -> None:
        self.client.request("delete_object", "deleting", missing=None, Key=self._key(key))

    def now(self) -> float:
        reply = self.client.request(
            "list_objects_v2", "listing", Prefix=self._key("gc/"), MaxKeys=1
        )
        return parsedate_to_datetime(reply["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()

    def free_reserve(self) -> None:
        """Nothing to do: what a server keeps for itself is its own matter."""

    def sweep(self, older_than: float) -> int:
        removed, limit = 0, time.time() - older_than
        marker: dict[str, Any] = {}
        while True:
            reply = self.client.request(
                "list_multipart_uploads", "listing uploads", Prefix=self._key(""), **marker
            )
            for item in reply.get("Uploads", []):
                if item["Initiated"].timestamp() < limit:
                    self._abort(item["Key"], item["UploadId"])
                    removed += 1
            if not reply.get("IsTruncated"):
                return removed
            marker = {
                "KeyMarker": reply["NextKeyMarker"],
                "UploadIdMarker": reply["NextUploadIdMarker"],
            }

    def scoped(self, prefix: str) -> S3Backend:
        return S3Backend(self.client, self._key(prefix))

    def with_short_timeouts(self) -> S3Backend:
        client = S3Client(self.client.bucket, self.client.settings.with_short_timeouts())
        return S3Backend(client, self.prefix)

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    @property
    def _patience(self) -> float:
        """Seconds that a part may take beyond its time on the slowest link."""
        return self.client.settings.connect_timeout + self.client.settings.read_timeout

    def _file_slice(self, descriptor: int, start: int, size: int) -> FileSlice:
        return FileSlice(descriptor, start, size, self._patience)

    def _put(self, key: str, data: bytes | FileSlice, *, replace: bool) -> bool:
        condition: dict[str, Any] = {} if replace else {"IfNoneMatch": "*"}
        tries: list[int] = []
        reply = self.client.request(
            "put_object",
            "writing",
            conflict=None,
            tries=tries,
            Key=self._key(key),
            Body=data,
            ContentMD5=md5(data) if isinstance(data, bytes) else data.md5(),
            **condition,
        )
        if reply is None and len(tries) > 1 and isinstance(data, bytes):
            # The first try may have succeeded, with only its reply lost.
            return self.read(key) == data
        return reply is not None

    def _upload_parts(self, descriptor: int, key: str, size: int, replace: bool) -> None:
        step = max(PART, -(-size // MAX_PARTS))
        target: dict[str, Any] = {"Key": self._key(key)}
        upload = self.client.request("create_multipart_upload", "starting an upload", **target)
        target["UploadId"] = upload["UploadId"]

        def part(start: int) -> dict[str, Any]:
            number = start // step + 1
            with self.client.slots:
                body = self._file_slice(descriptor, start, min(step, size - start))
                reply = self.client.request(
                    "upload_part",
                    "uploading",
                    PartNumber=number,
                    Body=body,
                    ContentMD5=body.md5(),
                    **target,
                )
            return {"ETag": reply["ETag"], "PartNumber": number}

        try:
            parts = in_parallel(part, range(0, size, step), TRANSFERS_AT_ONCE)
            condition: dict[str, Any] = {} if replace else {"IfNoneMatch": "*"}
            reply = self.client.request(
                "complete_multipart_upload",
                "finishing an upload",
                conflict=None,
                missing=None,  # the first try succeeded, its reply was lost; size is checked later
                MultipartUpload={"Parts": parts},
                **target,
                **condition,
            )
        except BaseException:
            self._abort(target["Key"], target["UploadId"])
            raise
        if reply is None:
            self._abort(target["Key"], target["UploadId"])

    def _abort(self, key: str, upload: str) -> None:
        try:
            self.client.request(
                "abort_multipart_upload", "ending an upload", missing=None, Key=key, UploadId=upload
            )
        except Exception as error:
            log.warning("could not end the upload of %s (sweep removes it later): %s", key, error)

    def _range(self, key: str, start: int, end: int, into: FileRegion | None = None) -> Any:
        """The reply; None if there is no such key, {} if the value ends before ``start``."""
        return self._get(key, past_end={}, into=into, Range=f"bytes={start}-{end - 1}")

    def _get(self, key: str, **options: Any) -> Any:
        """The reply; None if there is no such key. Raises ObjectUnreadable where a HEAD works."""
        try:
            return self.client.request(
                "get_object", "reading", missing=None, Key=self._key(key), **options
            )
        except StoreUnavailable as error:
            if status_of(error) != 500 or self.size(key) is None:
                raise
            raise ObjectUnreadable(
                f"{self.url} has an entry for {key}, but its server cannot read it "
                f"({code_of(error)}): a part of the server is down, or the object is lost, as in a "
                "power cut of SeaweedFS; `rlhf artifacts repair --lost` clears lost ones away"
            ) from error

    def _pages(
        self, prefix: str, **options: Any
    ) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
        while True:
            reply = self.client.request(
                "list_objects_v2", "listing", Prefix=self._key(prefix), **options
            )
            yield reply.get("Contents", []), reply.get("CommonPrefixes", [])
            if not reply.get("IsTruncated"):
                return
            options["ContinuationToken"] = reply["NextContinuationToken"]
