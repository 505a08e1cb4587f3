"""How writers and a collector of garbage that run at the same time keep out of each other's way.

What was just uploaded is safe by its age. What is old and about to be used again is not: a writer
finds a blob, the collector deletes it, the writer's manifest names what is gone. So

    the writer    1. writes a lease that names what it reuses,  2. waits while the flag is up,
                  3. looks whether all is there,  4. writes the manifest,  5. removes the lease
    the collector 1. puts up the flag,  2. reads leases, then manifests, then the rest,
                  3. deletes what none of them names,  4. takes down the flag

A writer that looked before the flag was up has left its lease, or its manifest, for the collector
to see; one that looked after it was down again sees in step 3 what was deleted. No clock takes part
in that. A flag whose owner died stops changing, and is then removed by whoever waits for it.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType

from rlhf_core.errors import StoreError, StoreUnavailable
from rlhf_core.store.artifact import Artifact
from rlhf_core.store.backend import Backend

log = logging.getLogger("rlhf_core.store")

FLAG = "gc/running.json"
LEASES = "leases/"

BEAT = 10.0  # seconds between two signs of life of a collector
LOST = 60.0  # seconds without one after which it must not delete any more
STALE = 180.0  # seconds without one after which others take it for dead


@contextmanager
def claim(backend: Backend, artifact: Artifact) -> Iterator[None]:
    """Keep a collector from deleting the artifact and its blobs while they are looked at and the
    manifest is written. One that runs already is waited for."""
    key = f"{LEASES}{uuid.uuid4().hex}.json"
    value = {"artifact": artifact.digest, "blobs": sorted({e.sha256 for e in artifact.files})}
    backend.write(key, json.dumps(value).encode())
    try:
        wait_for_collector(backend)
        yield
    finally:
        try:
            backend.delete(key)
        except StoreError as error:
            log.warning("lease %s is left to its age: %s", key, error)


def wait_for_collector(backend: Backend) -> None:
    """Return when no collection runs; one that shows no sign of life is over."""
    seen, since = b"", time.monotonic()
    while (flag := backend.read(FLAG)) is not None:
        if not seen:
            log.info("waiting for a garbage collection in %s", backend.url)
        if flag != seen:
            seen, since = flag, time.monotonic()
        elif time.monotonic() - since > STALE:
            log.warning("a garbage collection in %s died; its mark is removed", backend.url)
            backend.delete(FLAG)
            return
        time.sleep(0.3)


class Flag:
    """The collector's sign, kept up while it works.

    Raises:
        StoreError: by `check`, when it could not be kept up.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._owner = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()}
        self._value = self._text(0)
        self._beaten = 0.0
        self._lost = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="rlhf-gc")

    def __enter__(self) -> Flag:
        while not self._backend.create(FLAG, self._value):
            wait_for_collector(self._backend)
        self._beaten = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        self._thread.join()
        # A deletion without an answer may still happen: the flag then stays until it is stale.
        if not isinstance(error, StoreUnavailable):
            with suppress(StoreError):
                if self._backend.read(FLAG) == self._value:
                    self._backend.delete(FLAG)

    def check(self) -> None:
        """To be called before anything is deleted."""
        if self._lost or time.monotonic() - self._beaten > LOST:
            raise StoreError(
                f"the garbage collection in {self._backend.url} could not keep up its mark and "
                "stopped; nothing that is needed was deleted: start it again"
            )

    def _beat(self) -> None:
        count = 0
        while not self._end.wait(BEAT):
            count += 1
            with suppress(StoreError):
                if self._backend.read(FLAG) != self._value:
                    self._lost = True  # somebody took this collection for dead
                    return
                self._value = self._text(count)
                self._backend.write(FLAG, self._value)
                self._beaten = time.monotonic()

    def _text(self, count: int) -> bytes:
        return json.dumps({**self._owner, "beat": count}).encode()
