"""Leases: let writers and a garbage collector run at the same time.

New uploads are safe because of their age. An old blob that is about to be reused is not: a writer
finds it, the collector deletes it, and the writer's manifest references a missing blob. Therefore

    the writer    1. writes a lease that names what it reuses,  2. waits while the flag exists,
                  3. checks that all blobs exist,  4. writes the manifest,  5. removes the lease
    the collector 1. creates its flag,  2. reads leases, then manifests, then the rest,
                  3. deletes what none of them names,  4. removes its flag

If a writer checks before the flag exists, the collector sees its lease or its manifest. If it
checks after the flag is removed, step 3 finds what was deleted. This does not depend on clocks. The
flag of a dead collector stops changing; a waiting writer then removes it. Each collection has a key
of its own, so that a writer cannot remove the flag of another one that has begun meanwhile, and
several collections may run at once.
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

FLAGS = "gc/running"  # gc/running-<id>.json; an earlier version's is gc/running.json
LEASES = "leases/"

HEARTBEAT_SECONDS = 10.0  # between two heartbeats of a collector
LOST_SECONDS = 60.0  # without a heartbeat, after which the collector must stop deleting
STALE_SECONDS = 180.0  # without a heartbeat, after which others consider it dead


@contextmanager
def lease(backend: Backend, artifact: Artifact) -> Iterator[None]:
    """Protect the artifact and its blobs from a collector until the block ends.

    Waits first for a collector that is already running.
    """
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
            log.warning("lease %s is not removed and will expire: %s", key, error)


def wait_for_collector(backend: Backend) -> None:
    """Return when no collection is running; one without heartbeats counts as dead."""
    seen: dict[str, tuple[bytes | None, float]] = {}
    while keys := backend.keys(FLAGS):
        if not seen:
            log.info("waiting for a garbage collection in %s", backend.url)
        for key in keys:
            flag, now = backend.read(key), time.monotonic()
            if key not in seen or seen[key][0] != flag:
                seen[key] = flag, now
            elif now - seen[key][1] > STALE_SECONDS:
                log.warning("a garbage collection in %s died; removing its flag", backend.url)
                backend.delete(key)
        time.sleep(0.3)


class CollectionFlag:
    """The collector's flag: a record that a thread renews while the block runs."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.key = f"{FLAGS}-{uuid.uuid4().hex}.json"
        self._owner = {"host": socket.gethostname(), "pid": os.getpid()}
        self._value = self._text(0)
        self._last_heartbeat = 0.0
        self._lost = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._send_heartbeats, daemon=True, name="rlhf-gc")

    def __enter__(self) -> CollectionFlag:
        self._backend.write(self.key, self._value)
        self._last_heartbeat = time.monotonic()
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
        # A deletion without a reply may still happen, so the flag then stays until it is stale.
        if not isinstance(error, StoreUnavailable):
            with suppress(StoreError):
                self._backend.delete(self.key)

    def check(self) -> None:
        """Call this before each deletion.

        Raises:
            StoreError: the flag could not be renewed in time, so writers may not wait any more.
        """
        if self._lost or time.monotonic() - self._last_heartbeat > LOST_SECONDS:
            raise StoreError(
                f"the garbage collection in {self._backend.url} could not renew its flag and "
                "stopped; only garbage was deleted: start it again"
            )

    def _send_heartbeats(self) -> None:
        count = 0
        while not self._end.wait(HEARTBEAT_SECONDS):
            count += 1
            with suppress(StoreError):
                late = time.monotonic() - self._last_heartbeat > LOST_SECONDS
                if late or self._backend.read(self.key) != self._value:
                    self._lost = True  # another process considers this collection dead
                    return
                self._value = self._text(count)
                self._backend.write(self.key, self._value)
                self._last_heartbeat = time.monotonic()

    def _text(self, count: int) -> bytes:
        return json.dumps({**self._owner, "beat": count}).encode()
