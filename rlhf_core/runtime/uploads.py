"""Uploads checkpoints in the background, and retries while the store is unavailable."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rlhf_core.errors import StoreError, StoreUnavailable

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between two attempts, doubled each time
MOMENT = 2.0  # seconds; small checkpoints are stored within it, so that the next is not put off

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


@dataclass(frozen=True)
class Upload:
    """A checkpoint on its way to the store.

    Attributes:
        folder: this rank's files, which are removed at the end.
        send: sends this rank's files; repeated while it raises StoreError.
        commit: makes the checkpoint visible, by what the ranks' `send` returned in rank order. Only
            the first rank calls it.
    """

    step: int
    folder: Path
    send: Callable[[], Any]
    commit: Callable[[list[Any]], None]


@dataclass(frozen=True)
class Failure:
    """Why a rank could not send or commit, and whether another attempt may succeed."""

    text: str
    retry: bool


class Uploader:
    """Sends checkpoints in the background, one after another, all ranks together, and retries.

    Every rank makes one, and puts the same checkpoints; `close` is for the first rank. While one
    cannot be sent, a newer one may wait; it takes the other's place when all ranks have it.
    """

    def __init__(self, gather: Callable[[Any], list[Any]], first: bool) -> None:
        """Args:
        gather: one value of every rank, on every rank; called in a thread.
        first: this rank commits.
        """
        self._gather, self._first = gather, first
        self._changed = threading.Condition()
        self._waiting: Upload | None = None
        self._busy = self._closed = self._hurried = False
        self._failures, self._since = 0, 0.0  # of attempts since one succeeded

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is on its way."""
        return self._busy

    @property
    def ready(self) -> bool:
        """Whether `put` may be called: none is on its way, or one that fails and none waits."""
        return not self._busy or (self._failures > 0 and self._waiting is None)

    def put(self, upload: Upload) -> None:
        """Send a checkpoint; returns at once, where this is `ready`."""
        with self._changed:
            assert self.ready
            if self._busy:
                self._waiting = upload
                return
            self._busy = True
        threading.Thread(target=self._run, args=(upload,), name="uploads", daemon=True).start()

    def wait_until_ready(self) -> None:
        """Return when `put` may be called."""
        self._wait(lambda: self.ready, None)

    def wait_a_moment(self) -> None:
        """The same, or after MOMENT seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self.ready, MOMENT)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until nothing is on its way; returns whether that is so.

        Args:
            seconds: longest wait; None: no limit.
        """
        return self._wait(lambda: not self._busy, seconds)

    def _wait(self, condition: Callable[[], bool], seconds: float | None) -> bool:
        with self._changed:
            if self._busy and seconds != 0:  # pauses between attempts become short
                self._hurried = True
                self._changed.notify_all()
            return self._changed.wait_for(condition, seconds)

    def close(self) -> None:
        """Wait for the running attempt; there is no further one."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._busy)

    def _run(self, first: Upload) -> None:
        upload: Upload | None = first
        while upload is not None:
            try:
                self._send(upload)
            except Exception as error:  # another rank has ended
                print(f"WARNING: checkpoint {upload.step} was not stored: {error!r}", flush=True)
            shutil.rmtree(upload.folder, ignore_errors=True)
            with self._changed:
                upload, self._waiting = self._waiting, None
                self._busy = upload is not None
                self._hurried = self._hurried and self._busy
                self._changed.notify_all()

    def _send(self, upload: Upload) -> None:
        """Until it is stored, or not worth another attempt. Ranks decide together."""
        while not any(self._gather(self._closed)):
            problem = self._attempt(upload)
            if problem is None or not problem.retry:
                return
            self._pause()
            if all(self._gather(self._waiting is not None)):
                return

    def _attempt(self, upload: Upload) -> Failure | None:
        """Send and commit once; what went wrong on any rank."""
        sent = self._gather(_outcome(upload.send))
        problem = next((x for x in sent if isinstance(x, Failure)), None)
        committed = None
        if self._first and problem is None:
            committed = _outcome(lambda: upload.commit(sent))
        first_ranks = self._gather(committed)[0]
        if isinstance(first_ranks, Failure):
            problem = first_ranks
        if self._first:
            self._report(upload.step, problem)
        with self._changed:
            self._failures = 0 if problem is None or not problem.retry else self._failures + 1
            self._changed.notify_all()
        return problem

    def _report(self, step: int, problem: Failure | None) -> None:
        if problem is None and self._failures:
            seconds = time.monotonic() - self._since
            print(
                f"checkpoint {step} is stored, after {self._failures} failures in {seconds:.0f} s"
            )
        elif problem is not None and not problem.retry:
            # A bug; training continues, the next checkpoint may succeed.
            print(f"WARNING: checkpoint {step} was not stored: {problem.text}", flush=True)
        elif problem is not None and self._failures == 0:
            self._since = time.monotonic()
            print(
                f"WARNING: checkpoint {step} is not stored yet: {problem.text}. Training "
                "continues; the upload of the newest checkpoint is retried.",
                flush=True,
            )

    def _pause(self) -> None:
        """Between two attempts, also those of different checkpoints."""
        with self._changed:
            pause = backoff_seconds(self._failures)
            self._changed.wait_for(lambda: self._closed or self._hurried, pause)
            if self._hurried:
                self._changed.wait_for(lambda: self._closed, FIRST_PAUSE)


def _outcome(call: Callable[[], Result]) -> Result | Failure:
    """What a call returns, or why it failed."""
    try:
        return call()
    except StoreError as error:
        return Failure(str(error), retry=True)
    except Exception as error:
        return Failure(repr(error), retry=False)
