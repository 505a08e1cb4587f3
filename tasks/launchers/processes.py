"""Ending a process tree for good. torchrun gives its ranks sessions of their own, so signals to a
process group do not reach them: what counts is who descends from whom."""

from __future__ import annotations

import contextlib
import subprocess
import time

import psutil

from tasks.launchers.fork_client import Forked


class ProcessTree:
    """A child process and everything that ever descended from it, as far as it was looked at.

    Descendants are remembered, so that those whose parent died first are still found. psutil
    compares start times: a process that got the number of a dead one is never touched.
    """

    def __init__(self, process: subprocess.Popen[bytes] | Forked) -> None:
        self.process = process
        self._known: dict[int, psutil.Process] = {}

    def look(self) -> None:
        """Note the descendants of this moment."""
        for root in (self.process.pid, *self._known):
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process(root).children(recursive=True):
                    self._known.setdefault(child.pid, child)

    def living(self) -> list[psutil.Process]:
        """Known descendants that still run."""
        return [child for child in self._known.values() if _lives(child)]

    def end(self, patience: float) -> None:
        """SIGTERM to the process, which ends its own children; after `patience` seconds SIGKILL
        to it and to every descendant."""
        self.look()
        if self.process.poll() is None:
            self.process.terminate()
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and (self.process.poll() is None or self.living()):
            time.sleep(0.1)
            self.look()
        for child in self.living():
            with contextlib.suppress(psutil.Error):
                child.kill()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        psutil.wait_procs(self.living(), timeout=5)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
