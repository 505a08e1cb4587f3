"""One request to an S3 server: its connection, its time limit, its retries.

s3fs brings the session, the credentials and the event loop. Retries are made here and nowhere
else, so that they do not multiply.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from concurrent.futures import Future
from typing import Any

from rlhf_core.store.s3_errors import explain, is_missing, is_passing, is_second, status_of
from rlhf_core.store.settings import StoreSettings

log = logging.getLogger("rlhf_core.store")

PART = 16 * 2**20
PARTS_IN_MEMORY = 8  # of all files together: 128 MiB
SLOWEST = 128 * 2**10  # bytes per second; a part that is slower than that counts as stalled


class Connection:
    """What must not cross a fork: the filesystem and the locks."""

    def __init__(self, settings: StoreSettings) -> None:
        import s3fs  # here, so that a file store never pays for it

        self.pid = os.getpid()
        self.slots = threading.BoundedSemaphore(PARTS_IN_MEMORY)
        self.fs = s3fs.S3FileSystem(
            endpoint_url=settings.endpoint,
            profile=settings.profile,
            client_kwargs={
                "verify": None if settings.tls_verify else False,
                "region_name": settings.region,
            },
            config_kwargs={
                "connect_timeout": settings.connect_timeout,
                "read_timeout": settings.read_timeout,
                "retries": {"total_max_attempts": 1, "mode": "standard"},
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
                "max_pool_connections": 2 * PARTS_IN_MEMORY,
                "s3": {"addressing_style": "path" if settings.path_style else "virtual"},
            },
            use_listings_cache=False,
            skip_instance_cache=True,
        )
        self.fs.retries = 1


class S3Client:
    """Makes requests to one bucket; shared by all backends of a store and safe across a fork."""

    def __init__(self, bucket: str, settings: StoreSettings) -> None:
        self.bucket = bucket
        self.settings = settings
        self._connection: Connection | None = None
        self._connecting = threading.Lock()

    def __reduce__(self) -> tuple[type[S3Client], tuple[str, StoreSettings]]:
        # A connection holds locks and keys; what is unpickled makes its own.
        return S3Client, (self.bucket, self.settings)

    @property
    def slots(self) -> threading.BoundedSemaphore:
        """To be held while a part is in memory."""
        return self.connected().slots

    def connected(self) -> Connection:
        connection = self._connection
        if connection is None or connection.pid != os.getpid():
            # A lock that a forked parent's thread held would stay locked here for good.
            if connection is not None:
                self._connecting = threading.Lock()
            with self._connecting:
                connection = self._connection
                if connection is None or connection.pid != os.getpid():
                    connection = self._connection = Connection(self.settings)
        return connection

    def request(
        self, method: str, doing: str, tries: list[int] | None = None, **arguments: Any
    ) -> Any:
        """One call of the S3 API, repeated while the failure is a passing one.

        ``missing``, ``second`` and ``beyond`` say what to return when there is no such key, when
        another writer came first, and when a range starts after the end; without them it raises.
        """
        answers = {
            name: arguments.pop(name)
            for name in ("missing", "second", "beyond")
            if name in arguments
        }
        attempt = 0
        while True:
            attempt += 1
            if tries is not None:
                tries.append(attempt)
            try:
                return self._once(method, arguments)
            except Exception as error:
                if "missing" in answers and is_missing(error):
                    return answers["missing"]
                if "second" in answers and is_second(error):
                    return answers["second"]
                if "beyond" in answers and status_of(error) == 416:
                    return answers["beyond"]
                if attempt > self.settings.retries or not is_passing(error):
                    raise explain(
                        error,
                        bucket=self.bucket,
                        endpoint=self.settings.endpoint_name(),
                        doing=doing,
                    ) from error
                pause = min(0.4 * 2**attempt, 8.0)
                log.warning(
                    "%s at %s failed (%s), try %d of %d in %.1f s",
                    doing, self.bucket, type(error).__name__,
                    attempt + 1, self.settings.retries + 1, pause,
                )  # fmt: skip
                time.sleep(pause)

    def _once(self, method: str, arguments: dict[str, Any]) -> Any:
        fs = self.connected().fs
        # read_timeout does not cover a request body that stalls, so each call has its own limit.
        moved = len(arguments.get("Body", b"")) or PART
        limit = self.settings.connect_timeout + self.settings.read_timeout + moved / SLOWEST

        async def call() -> Any:
            reply = await fs._call_s3(method, Bucket=self.bucket, **arguments)
            if method == "get_object":
                reply["Body"] = await reply["Body"].read()
            return reply

        future: Future[Any] = asyncio.run_coroutine_threadsafe(
            asyncio.wait_for(call(), limit), fs.loop
        )
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise
