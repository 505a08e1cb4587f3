"""Uploads checkpoints in the background, and retries while the store is unavailable."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rlhf_core.errors import StoreError, StoreUnavailable

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between two attempts, doubled each time

Result = TypeVar("Result")


def backoff_seconds(failures: int) -> float:
    """Seconds to wait after this many failures in a row."""
    return min(FIRST_PAUSE * 2.0 ** (failures - 1), LONGEST_PAUSE)


def retry_while_unavailable(call: Callable[[], Result], what: str, timeout: float) -> Result:
    """The result of a call to the store, which is repeated while the store is unavailable.

    Args:
        what: is sent, for the warnings.
        timeout: seconds after which no further attempt is made.

    Raises:
        StoreUnavailable: the store was unavailable for longer than `timeout`.
    """
    began, failures = time.monotonic(), 0
    while True:
        try:
            return call()
        except StoreUnavailable as error:
            left = began + timeout - time.monotonic()
            if left <= 0:
                raise
            failures += 1
            pause = min(backoff_seconds(failures), left)
            print(
                f"WARNING: {what} waits for the store, at most {left:.0f} s more: {error}",
                flush=True,
            )
            time.sleep(pause)


class Uploader:
    """Publishes the newest folder that it was given, and retries until it succeeds.

    A newer folder replaces one that still waits, so that at most two are on this machine's disk:
    the one being uploaded, and the one that waits.
    """

    def __init__(self, publish: Callable[[Path, int], None]) -> None:
        """Args:
        publish: uploads a folder, which is the state after a step; may raise anything.
        """
        self._publish = publish
        self._changed = threading.Condition()
        self._waiting: tuple[Path, int] | None = None
        self._busy = self._closed = self._hurried = False
        self._thread: threading.Thread | None = None

    def put(self, folder: Path, step: int) -> None:
        """Queue a folder, which is removed when it is in the store. Returns at once."""
        with self._changed:
            self._replace((folder, step))
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="uploads", daemon=True)
            self._thread.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until everything is in the store; returns whether it is.

        Args:
            seconds: longest wait; None: no limit.
        """
        with self._changed:
            if seconds != 0:  # a caller waits: the pauses between attempts become short
                self._hurried = True
                self._changed.notify_all()
            return self._changed.wait_for(lambda: not (self._waiting or self._busy), seconds)

    def close(self) -> None:
        """Drop the folder that waits, and wait for the running upload."""
        with self._changed:
            self._closed = True
            self._replace(None)
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _replace(self, new: tuple[Path, int] | None) -> None:
        if self._waiting is not None:
            shutil.rmtree(self._waiting[0], ignore_errors=True)
        self._waiting = new

    def _run(self) -> None:
        failures, since = 0, time.monotonic()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._waiting is None:
                    return
                (folder, step), self._waiting, self._busy = self._waiting, None, True
            if failures == 0:
                since = time.monotonic()
            done = self._try(folder, step, failures, since)
            failures = 0 if done else failures + 1
            with self._changed:
                if done or self._waiting or self._closed:
                    shutil.rmtree(folder, ignore_errors=True)
                else:
                    self._waiting = (folder, step)
                self._busy = False
                self._changed.notify_all()
                if not done:  # a newer one is tried at the same pace
                    pause = backoff_seconds(failures)
                    self._changed.wait_for(lambda: self._closed or self._hurried, pause)
                    if self._hurried:
                        self._changed.wait_for(lambda: self._closed, FIRST_PAUSE)

    def _try(self, folder: Path, step: int, failures: int, since: float) -> bool:
        """Whether the folder needs no further attempt."""
        try:
            self._publish(folder, step)
        except StoreError as error:
            if failures == 0:
                print(
                    f"WARNING: checkpoint {step} is not stored yet: {error}. Training continues; "
                    "the upload of the newest checkpoint is retried.",
                    flush=True,
                )
            return False
        except Exception as error:  # a bug; training continues, the next checkpoint may succeed
            print(f"WARNING: checkpoint {step} was not stored: {error!r}", flush=True)
            return True
        if failures:
            seconds = time.monotonic() - since
            print(f"checkpoint {step} is stored, after {failures} failures in {seconds:.0f} s")
        return True
