"""Terminates a whole process tree. torchrun starts its ranks in new sessions, so that signals to a
process group do not reach them; descendants are followed instead."""

from __future__ import annotations

import contextlib
import subprocess
import time

import psutil

from tasks.launchers.fork_client import Forked


class ProcessTree:
    """A child process and all descendants that `refresh` has seen.

    Descendants are remembered, so that they are found after their parent has died. psutil compares
    start times, so that a process that reuses the id of a dead one is never signalled.
    """

    def __init__(self, process: subprocess.Popen[bytes] | Forked) -> None:
        self.process = process
        self._known: dict[int, psutil.Process] = {}

    def refresh(self) -> None:
        """Remember the current descendants, and forget those that have ended. One look at the
        machine's processes, however many descendants there are."""
        self._known = {pid: child for pid, child in self._known.items() if _alive(child)}
        children = by_parent()
        parents = [*self._known]
        if self.process.poll() is None:
            parents.append(self.process.pid)
        while parents:
            for child in children.get(parents.pop(), ()):
                if child.pid not in self._known:
                    self._known[child.pid] = child
                    parents.append(child.pid)

    def alive(self) -> list[psutil.Process]:
        """Known descendants that still run."""
        return [child for child in self._known.values() if _alive(child)]

    def terminate(self, grace_seconds: float) -> None:
        """Send SIGTERM to the process, which ends its own children; after `grace_seconds` send
        SIGKILL to it and to every descendant."""
        self.refresh()
        if self.process.poll() is None:
            self.process.terminate()
        deadline = time.monotonic() + grace_seconds
        while time.monotonic() < deadline and (self.process.poll() is None or self.alive()):
            time.sleep(0.1)
            self.refresh()
        for child in self.alive():
            with contextlib.suppress(psutil.Error):
                child.kill()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        psutil.wait_procs(self.alive(), timeout=5)


def by_parent() -> dict[int, list[psutil.Process]]:
    """Id of a process -> its children, of all processes of this machine."""
    found: dict[int, list[psutil.Process]] = {}
    for pid in psutil.pids():
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            process = psutil.Process(pid)
            found.setdefault(process.ppid(), []).append(process)
    return found


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
