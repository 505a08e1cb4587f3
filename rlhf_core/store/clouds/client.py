"""Sends requests to one bucket of a cloud through obstore, with time limits and retries."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from email.utils import parsedate_to_datetime
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from typing import Any, TypeVar

from rlhf_core.errors import StoreError
from rlhf_core.store.clouds.cloud import CLOUDS
from rlhf_core.store.clouds.errors import (
    is_conflict,
    is_missing,
    is_past_end,
    is_transient,
    to_store_error,
)
from rlhf_core.store.process_local import ProcessLocal
from rlhf_core.store.settings import StoreSettings

log = logging.getLogger("rlhf_core.store")

PART = 16 * 2**20
SLOWEST = 128 * 2**10  # bytes per second; a slower part counts as stalled
TRANSFERS_AT_ONCE = 8  # parts of all files together, each held in memory

T = TypeVar("T")
_used_by: int | None = None  # the process in which obstore has started its threads


def library() -> Any:
    """obstore, usable in this process.

    Its threads do not survive a fork, and in the child it would wait for them for ever. Therefore a
    child whose parent has used it loads a copy of its own.
    """
    global _used_by
    import obstore  # here, so that another store never pays for it

    if _used_by not in (None, os.getpid()):
        name = "obstore._obstore"
        file = sys.modules[name].__file__
        assert file is not None
        for loaded in [m for m in sys.modules if m.partition(".")[0] == "obstore"]:
            del sys.modules[loaded]
        with tempfile.TemporaryDirectory() as folder:
            loader = ExtensionFileLoader(name, shutil.copy(file, folder))
            spec = spec_from_loader(name, loader)
            assert spec is not None
            sys.modules[name] = module_from_spec(spec)
            loader.exec_module(sys.modules[name])
        obstore = importlib.import_module("obstore")
    _used_by = os.getpid()
    return obstore


class Connection:
    """obstore and its stores, which must not be used after a fork.

    Attributes:
        store: without retries, since only the caller knows which requests can be repeated.
        patient: retries the parts of an upload by itself.
    """

    def __init__(self, scheme: str, bucket: str, settings: StoreSettings) -> None:
        self.slots = threading.BoundedSemaphore(TRANSFERS_AT_ONCE)
        self.obstore = library()
        kind = getattr(importlib.import_module("obstore.store"), _CLASSES[scheme])
        options = {
            "allow_http": CLOUDS[scheme].endpoint.startswith("http://"),
            "allow_invalid_certificates": not settings.tls_verify,
            "connect_timeout": timedelta(seconds=settings.connect_timeout),
            "read_timeout": timedelta(seconds=settings.read_timeout),
            "timeout": timedelta(seconds=settings.read_timeout + PART / SLOWEST),
        }
        backoff = {"init_backoff": timedelta(seconds=0.8), "max_backoff": timedelta(seconds=3)}
        self.store, self.patient = (
            kind(
                bucket,
                client_options=options,
                retry_config={"max_retries": retries, "backoff": backoff},
            )
            for retries in (0, settings.retries)
        )


_CLASSES = {"gs": "GCSStore", "az": "AzureStore"}


class CloudClient:
    """Sends requests to one bucket; shared by all backends of a store and safe across a fork."""

    def __init__(self, scheme: str, bucket: str, settings: StoreSettings) -> None:
        self.scheme, self.bucket, self.settings = scheme, bucket, settings
        self.cloud = CLOUDS[scheme]
        self._connection = ProcessLocal(self._connect)

    def __reduce__(self) -> tuple[type[CloudClient], tuple[str, str, StoreSettings]]:
        # A connection holds locks and credentials; an unpickled client opens its own.
        return CloudClient, (self.scheme, self.bucket, self.settings)

    @property
    def slots(self) -> threading.BoundedSemaphore:
        """Limits the parts in transfer: acquire it for each part."""
        return self.connected().slots

    def connected(self) -> Connection:
        """The connection of this process, opened on first use.

        Raises:
            StoreUnavailable: credentials or an address are malformed.
        """
        return self._connection.get()

    def _connect(self) -> Connection:
        try:
            return Connection(self.scheme, self.bucket, self.settings)
        except StoreError:
            raise
        except Exception as error:  # a key that is not base64, a damaged file of credentials
            # not "from error", whose text may hold the key
            raise to_store_error(error, self.cloud, self.bucket, "connecting") from None

    def request(
        self,
        action: str,
        call: Callable[[Connection], T],
        tries: list[int] | None = None,
        retries: int | None = None,
        **answers: Any,
    ) -> T | Any:
        """One call of obstore, repeated while the failure is transient.

        Args:
            action: what the request does, for the error's text.
            tries: gets one item per attempt.
            retries: None: as the settings say.
            answers: missing, conflict, past_end: what to return when there is no such key, when
                another writer came first, or when a range starts after the value's end. Without
                them, these cases raise.

        Raises:
            StoreError, StoreUnavailable: the request failed, after its retries.
        """
        cases = {"missing": is_missing, "conflict": is_conflict, "past_end": is_past_end}
        retries = self.settings.retries if retries is None else retries
        connection, attempt = self.connected(), 0
        while True:
            attempt += 1
            if tries is not None:
                tries.append(attempt)
            try:
                return call(connection)
            except StoreError:
                raise
            except Exception as error:
                for case, value in answers.items():
                    if cases[case](error):
                        return value
                if attempt > retries or not is_transient(error):
                    raise to_store_error(error, self.cloud, self.bucket, action) from None
                pause = min(0.4 * 2**attempt, 3.0)
                log.warning(
                    "%s at %s failed (%s), try %d of %d in %.1f s",
                    action, self.bucket, type(error).__name__, attempt + 1, retries + 1, pause,
                )  # fmt: skip
                time.sleep(pause)

    def server_time(self) -> float:
        """The service's clock, in seconds since 1970: obstore shows no headers of a reply."""
        import httpx

        def ask(_: Connection) -> float:
            try:
                limit = httpx.Timeout(
                    self.settings.read_timeout, connect=self.settings.connect_timeout
                )
                # Without credentials: any reply has the date, a refusal too.
                reply = httpx.head(
                    self.cloud.endpoint, timeout=limit, verify=self.settings.tls_verify
                )
            except httpx.TransportError as error:
                raise ConnectionError(f"error sending request: {error}") from error
            return parsedate_to_datetime(reply.headers["date"]).timestamp()

        return float(self.request("asking for the time", ask))
