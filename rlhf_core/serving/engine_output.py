"""What another program's processes print while they start: kept back, and shown if they fail."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
from types import TracebackType

KEPT = 2**18  # bytes, the newest
REASON = re.compile(r"(?:^|\s)(?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt): (\S.*)$")
VAGUE = ("Engine core initialization failed", "Failed core proc")


class EngineOutput:
    """Standard output and errors of this process and those that it starts meanwhile.

    What they print is kept back until `let_through`; then it goes where it always went.
    """

    def __enter__(self) -> EngineOutput:
        self._kept = b""
        self._through = False
        self._lock = threading.Lock()
        sys.stdout.flush()
        sys.stderr.flush()
        self._own = (os.dup(1), os.dup(2))
        reading, writing = os.pipe()
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        os.close(writing)
        self._pump = threading.Thread(target=self._pass_on, args=(reading,), daemon=True)
        self._pump.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._give_back()

    def let_through(self) -> None:
        """From now on this process prints as before, and what others print comes to its errors."""
        self._give_back()
        with self._lock:
            self._through = True

    def settle(self) -> None:
        """Wait, but not long, for what processes that have ended printed last."""
        self._give_back()
        self._pump.join(timeout=2)

    def reason(self) -> str | None:
        """The last error that was printed with a message."""
        with self._lock:
            lines = self._kept.decode(errors="replace").splitlines()
        found = [match[1] for line in lines if (match := REASON.search(line.rstrip()))]
        found = [text for text in found if not text.startswith(VAGUE)]
        return found[-1].rstrip(".") if found else None

    def _give_back(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, own in enumerate(self._own, start=1):
            os.dup2(own, number)

    def _pass_on(self, reading: int) -> None:
        with contextlib.suppress(OSError):
            while said := os.read(reading, 65536):
                with self._lock:
                    if self._through:
                        os.write(self._own[1], said)
                    else:
                        self._kept = (self._kept + said)[-KEPT:]
