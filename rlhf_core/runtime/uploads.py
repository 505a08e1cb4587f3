"""Checkpoints go to the store in the background, and a store that is away is waited for."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rlhf_core.errors import StoreError, StoreUnavailable

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between two tries, doubled each time

Result = TypeVar("Result")


def pause_after(failures: int) -> float:
    """Seconds to wait after so many failures in a row."""
    return min(FIRST_PAUSE * 2.0 ** (failures - 1), LONGEST_PAUSE)


def patiently(call: Callable[[], Result], what: str, patience: float) -> Result:
    """The result of a call to the store, repeated while the store is away.

    Raises:
        StoreUnavailable: it was away for more than `patience` seconds.
    """
    began, failures = time.monotonic(), 0
    while True:
        try:
            return call()
        except StoreUnavailable as error:
            left = began + patience - time.monotonic()
            if left <= 0:
                raise
            failures += 1
            pause = min(pause_after(failures), left)
            print(
                f"WARNING: {what} waits for the store, {left:.0f} s more at most: {error}",
                flush=True,
            )
            time.sleep(pause)


class Uploader:
    """Publishes the newest of the folders that it is given, again and again until it succeeds.

    A folder that was not sent yet when a newer one comes is dropped, so that at most two lie on
    this machine's disk: one under way, one that waits.
    """

    def __init__(self, publish: Callable[[Path, int], None]) -> None:
        """Args:
        publish: sends a folder, the state after so many steps; may raise anything.
        """
        self._publish = publish
        self._changed = threading.Condition()
        self._waiting: tuple[Path, int] | None = None
        self._busy = self._closed = self._hurried = False
        self._thread: threading.Thread | None = None

    def put(self, folder: Path, step: int) -> None:
        """Hand over a folder, which is removed when it is in the store. Returns at once."""
        with self._changed:
            self._replace((folder, step))
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="uploads", daemon=True)
            self._thread.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until everything is in the store, or for so long; whether it is."""
        with self._changed:
            if seconds != 0:  # somebody waits: pauses between tries become short
                self._hurried = True
                self._changed.notify_all()
            return self._changed.wait_for(lambda: not (self._waiting or self._busy), seconds)

    def close(self) -> None:
        """Drop what waits, and wait for what is under way."""
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
                    pause = pause_after(failures)
                    self._changed.wait_for(lambda: self._closed or self._hurried, pause)
                    if self._hurried:
                        self._changed.wait_for(lambda: self._closed, FIRST_PAUSE)

    def _try(self, folder: Path, step: int, failures: int, since: float) -> bool:
        """Whether the folder needs no further try."""
        try:
            self._publish(folder, step)
        except StoreError as error:
            if failures == 0:
                print(
                    f"WARNING: checkpoint {step} is not stored yet: {error}. Training goes on; "
                    "the newest checkpoint is tried again until the store takes it.",
                    flush=True,
                )
            return False
        except Exception as error:  # only a bug; training goes on, the next one may do
            print(f"WARNING: checkpoint {step} was not stored: {error!r}", flush=True)
            return True
        if failures:
            seconds = time.monotonic() - since
            print(f"checkpoint {step} is stored, after {failures} failures in {seconds:.0f} s")
        return True
