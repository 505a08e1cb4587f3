"""Captures the output of this process and its children during startup, to report failures."""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import sys
import threading
import time
from types import TracebackType

KEPT = 2**18  # bytes, the newest
DRAIN_SECONDS = 1.0  # for output from before `release` that is still in the pipe
REASON = re.compile(r"(?:^|\s)(?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt): (\S.*)$")
VAGUE = ("Engine core initialization failed", "Failed core proc")


class EngineOutput:
    """Captures standard output and errors of this process and of processes that it starts.

    After `release`, output goes to its original destination again.
    """

    def __enter__(self) -> EngineOutput:
        self._kept = b""
        self._released = False
        self._lock = threading.Lock()
        sys.stdout.flush()
        sys.stderr.flush()
        self._own = (os.dup(1), os.dup(2))
        self._reading, writing = os.pipe()
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        os.close(writing)
        self._pump = threading.Thread(target=self._pump_output, daemon=True)
        self._pump.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def release(self) -> None:
        """Stop capturing: this process prints as before, the children to its standard error."""
        self._restore()
        end = time.monotonic() + DRAIN_SECONDS
        while not self._released:
            with self._lock:  # the pump reads under the lock, so an empty pipe means all is kept
                self._released = not _readable(self._reading, 0) or time.monotonic() > end
            time.sleep(0.001)

    def settle(self) -> None:
        """Wait up to 2 seconds for the last output of processes that have ended."""
        self._restore()
        self._pump.join(timeout=2)

    def reason(self) -> str | None:
        """The message of the last exception in the captured output; None without one."""
        with self._lock:
            lines = self._kept.decode(errors="replace").splitlines()
        found = [match[1] for line in lines if (match := REASON.search(line.rstrip()))]
        found = [text for text in found if not text.startswith(VAGUE)]
        return found[-1].rstrip(".") if found else None

    def _restore(self) -> None:
        """Give this process its own standard output and errors again."""
        sys.stdout.flush()
        sys.stderr.flush()
        for number, own in enumerate(self._own, start=1):
            os.dup2(own, number)

    def _pump_output(self) -> None:
        """Keep what is written to the pipe; after `release`, pass it on to standard error."""
        with contextlib.suppress(OSError):
            while _readable(self._reading):
                with self._lock:
                    if not (data := os.read(self._reading, 65536)):
                        return
                    if self._released:
                        os.write(self._own[1], data)
                    else:
                        self._kept = (self._kept + data)[-KEPT:]


def _readable(descriptor: int, seconds: float | None = None) -> bool:
    """Whether a read would not block, within so many seconds; None: wait without a limit."""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        return bool(selector.select(seconds))
