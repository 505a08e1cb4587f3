"""The output of a launch's pods, as it comes: one stream per pod, opened again where it breaks."""

from __future__ import annotations

import queue
import re
import threading
import time
from datetime import datetime

from tasks.launchers.kubernetes.api import Cluster, Object
from tasks.launchers.kubernetes.manifest import CONTAINER
from tasks.launchers.kubernetes.state import has_output, node_of

REOPEN_SECONDS = 1.0
OVERLAP_SECONDS = 5.0  # that a stream is opened again before its last line; clocks may differ
GIVE_UP_SECONDS = 60.0  # after a pod's end, with an API that does not give its log
# "2026-11-30T01:02:03.123456789Z text"; trailing zeros of the fraction are left out
STAMP = re.compile(rb"^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d+))?(Z|[+-]\d\d:\d\d) (.*)$", re.S)


class Logs:
    """Gathers the lines of all pods that are followed.

    Attributes:
        lines: (rank of the node, line) in the order in which they came.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.lines: queue.Queue[tuple[int, str]] = queue.Queue()
        self._cluster = cluster
        self._streams: dict[str, _Stream] = {}
        self._lock = threading.Lock()

    def follow(self, pod: Object, gone: bool = False) -> None:
        """Read from a pod, if it has output. Call for each change.

        Args:
            gone: it was deleted.
        """
        uid = pod["metadata"]["uid"]
        with self._lock:
            if uid not in self._streams and has_output(pod):
                self._streams[uid] = _Stream(self._cluster, pod, self.lines)
            if uid in self._streams:
                self._streams[uid].pod_ended = gone or not _runs(pod)

    def finish(self, seconds: float) -> None:
        """Wait until all is read, or for so many seconds."""
        end = time.monotonic() + seconds
        for stream in list(self._streams.values()):
            stream.thread.join(max(0.0, end - time.monotonic()))

    def close(self) -> None:
        """Open no stream again. Streams that are open end with their pods."""
        for stream in list(self._streams.values()):
            stream.closed = True


class _Stream:
    """The log of one pod, read in a thread of its own."""

    def __init__(self, cluster: Cluster, pod: Object, lines: queue.Queue[tuple[int, str]]) -> None:
        self.name, self.node, self.lines = pod["metadata"]["name"], node_of(pod), lines
        self.pod_ended = self.closed = False
        self._cluster = cluster
        self._seen = _Seen()
        self.thread = threading.Thread(target=self._run, name=f"log of {self.name}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        failing_since: float | None = None
        while not self.closed:
            ended = self.pod_ended  # before reading: what it wrote last is then read
            try:
                for line in self._cluster.logs(self.name, CONTAINER, self._seen.since()):
                    failing_since = None
                    if (text := self._seen.new(line)) is not None:
                        self.lines.put((self.node, text))
                if ended:
                    return
            except (ApiException, HTTPError, OSError, ValueError) as error:
                if getattr(error, "status", 0) == 404:
                    return
                failing_since = failing_since or time.monotonic()
                if ended and time.monotonic() - failing_since > GIVE_UP_SECONDS:
                    return
            time.sleep(REOPEN_SECONDS)


class _Seen:
    """Which lines of a log have been read, by their times: a stream is opened again some seconds
    before the newest line."""

    def __init__(self) -> None:
        self._newest: tuple[float, str] = (0.0, "")  # seconds since 1970, fraction of 9 digits
        self._count = 0  # lines with the newest time
        self._skip = 0  # of those with the newest time, to be skipped after opening again
        self._read_at = 0.0

    def since(self) -> float | None:
        """How many seconds ago to begin; None: at the beginning. Call before each opening."""
        self._skip = self._count
        if not self._count:
            return None
        return time.monotonic() - self._read_at + OVERLAP_SECONDS

    def new(self, raw: bytes) -> str | None:
        """The text of a line; None: it was read before."""
        match = STAMP.match(raw)
        if match is None:
            return raw.decode("utf-8", "replace")  # an error of the API, or the rest of a line
        second, fraction, zone, text = match.groups()
        when = datetime.fromisoformat((second + zone.replace(b"Z", b"+00:00")).decode()).timestamp()
        stamp = (when, (fraction or b"").decode().ljust(9, "0"))
        if stamp < self._newest:
            return None
        if stamp == self._newest:
            if self._skip:
                self._skip -= 1
                return None
            self._count += 1
        else:
            self._newest, self._count, self._skip = stamp, 1, 0
        self._read_at = time.monotonic()
        return text.decode("utf-8", "replace")


def _runs(pod: Object) -> bool:
    return pod.get("status", {}).get("phase") not in ("Succeeded", "Failed")
