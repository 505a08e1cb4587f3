"""Sends requests to an S3 server, with time limits and retries.

botocore provides credentials, signatures and a connection pool that threads share. All retries are
made here, so that they do not multiply.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from rlhf_core.errors import StoreError
from rlhf_core.store.process_local import ProcessLocal
from rlhf_core.store.s3.errors import (
    is_conflict,
    is_missing,
    is_transient,
    status_of,
    to_store_error,
)
from rlhf_core.store.s3.parts import FileRegion, FileSlice
from rlhf_core.store.settings import StoreSettings

log = logging.getLogger("rlhf_core.store")

TRANSFERS_AT_ONCE = 10  # parts of all files together; more were not faster, with boto3 neither


def botocore_options(settings: StoreSettings) -> dict[str, Any]:
    """Arguments of botocore's Config: time limits, no retries, addresses, checksums."""
    return {
        "connect_timeout": settings.connect_timeout,
        "read_timeout": settings.read_timeout,
        "retries": {"total_max_attempts": 1, "mode": "standard"},
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        "max_pool_connections": 2 * TRANSFERS_AT_ONCE,
        "tcp_keepalive": True,
        "s3": {
            "addressing_style": "path" if settings.path_style else "virtual",
            # The MD5 of the body is signed, and our own sha256 is compared by every reader: a
            # second sha256 of each part, for the signature, would only cost time.
            "payload_signing_enabled": False,
        },
    }


class Connection:
    """A botocore client and its locks, which must not be used after a fork."""

    def __init__(self, settings: StoreSettings) -> None:
        import botocore.session  # here, so that a file store never pays for it
        from botocore.config import Config

        self.slots = threading.BoundedSemaphore(TRANSFERS_AT_ONCE)
        self.client = botocore.session.Session(profile=settings.profile).create_client(
            "s3",
            endpoint_url=settings.endpoint,
            region_name=settings.region,
            verify=None if settings.tls_verify else False,
            config=Config(**botocore_options(settings)),
        )


class S3Client:
    """Sends requests to one bucket; shared by all backends of a store and safe across a fork."""

    def __init__(self, bucket: str, settings: StoreSettings) -> None:
        self.bucket = bucket
        self.settings = settings
        self._connection = ProcessLocal(self._connect)

    def __reduce__(self) -> tuple[type[S3Client], tuple[str, StoreSettings]]:
        # A connection holds locks and credentials; an unpickled client opens its own.
        return S3Client, (self.bucket, self.settings)

    @property
    def slots(self) -> threading.BoundedSemaphore:
        """Limits the parts in transfer: acquire it for each part."""
        return self.connected().slots

    def connected(self) -> Connection:
        """The connection of this process, opened on first use.

        Raises:
            StoreUnavailable: a profile or an endpoint is invalid.
        """
        return self._connection.get()

    def _connect(self) -> Connection:
        try:
            return Connection(self.settings)
        except Exception as error:  # an unknown profile, a malformed URL
            raise self._explained(error, "connecting") from error

    def request(
        self,
        method: str,
        action: str,
        tries: list[int] | None = None,
        into: FileRegion | None = None,
        **arguments: Any,
    ) -> Any:
        """One call of the S3 API, repeated while the failure is transient.

        A reply's Body is read whole, or written ``into`` a region of a file. Without the arguments
        below, these cases raise.

        Args:
            action: what the request does, for the error's text.
            tries: gets one item per attempt.
            missing: what to return when there is no such key.
            conflict: what to return when another writer came first.
            past_end: what to return when a range starts after the end of the value.

        Raises:
            StoreError, StoreUnavailable: the request failed, after its retries.
        """
        answers = {
            name: arguments.pop(name)
            for name in ("missing", "conflict", "past_end")
            if name in arguments
        }
        attempt = 0
        while True:
            attempt += 1
            if tries is not None:
                tries.append(attempt)
            try:
                return self._once(method, into, arguments)
            except StoreError:
                raise
            except Exception as error:
                if into is not None and into.failure is not None:
                    raise into.failure from None  # the local disk failed, not the server
                if "missing" in answers and is_missing(error):
                    return answers["missing"]
                if "conflict" in answers and is_conflict(error):
                    return answers["conflict"]
                if "past_end" in answers and status_of(error) == 416:
                    return answers["past_end"]
                if attempt > self.settings.retries or not is_transient(error):
                    raise self._explained(error, action) from error
                pause = min(0.4 * 2**attempt, 3.0)  # about 11 s in all, so it fails within 30 s
                log.warning(
                    "%s at %s failed (%s), try %d of %d in %.1f s",
                    action, self.bucket, type(error).__name__,
                    attempt + 1, self.settings.retries + 1, pause,
                )  # fmt: skip
                time.sleep(pause)

    def _once(self, method: str, into: FileRegion | None, arguments: dict[str, Any]) -> Any:
        if isinstance(body := arguments.get("Body"), FileSlice):
            body.seek(0)  # an earlier try has read some of it
        call = getattr(self.connected().client, method)
        reply = call(Bucket=self.bucket, **arguments)
        if method == "get_object":
            with reply["Body"] as body:
                reply["Body"] = body.read() if into is None else into.fill(body)
        return reply

    def _explained(self, error: Exception, action: str) -> Exception:
        endpoint = self.settings.endpoint_name()
        return to_store_error(error, bucket=self.bucket, endpoint=endpoint, action=action)
