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
    """Sends one checkpoint at a time in the background, all ranks together, and retries.

    Every rank makes one and calls its methods for the same steps; `close` is for the first rank.
    """

    def __init__(self, gather: Callable[[Any], list[Any]], first: bool) -> None:
        """Args:
        gather: one value of every rank, on every rank; called in a thread.
        first: this rank commits.
        """
        self._gather, self._first = gather, first
        self._changed = threading.Condition()
        self._busy = self._superseded = self._closed = self._hurried = False
        self._failures, self._since = 0, 0.0  # of attempts since one succeeded

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is on its way."""
        return self._busy

    def put(self, upload: Upload) -> None:
        """Send a checkpoint; returns at once. None may be on its way, see `make_way`."""
        assert not self._busy
        self._busy = True
        threading.Thread(target=self._run, args=(upload,), name="uploads", daemon=True).start()

    def supersede(self) -> None:
        """Give up what is on its way instead of a further attempt: there is a newer state."""
        with self._changed:
            self._superseded = self._busy

    def make_way(self) -> None:
        """Wait until `put` may be called."""
        self.supersede()
        self.wait()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until nothing is on its way; returns whether that is so.

        Args:
            seconds: longest wait; None: no limit.
        """
        with self._changed:
            if seconds != 0 and self._busy:  # pauses between attempts become short
                self._hurried = True
                self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._busy, seconds)

    def close(self) -> None:
        """Wait for the running attempt; there is no further one."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._busy)

    def _run(self, upload: Upload) -> None:
        try:
            while (problem := self._attempt(upload)) and problem.retry:
                self._pause()
                if any(self._gather(self._closed or self._superseded)):
                    break
        except Exception as error:  # another rank has ended
            print(f"WARNING: checkpoint {upload.step} was not stored: {error!r}", flush=True)
        shutil.rmtree(upload.folder, ignore_errors=True)
        with self._changed:
            self._busy = self._superseded = self._hurried = False
            self._changed.notify_all()

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
        self._failures = 0 if problem is None or not problem.retry else self._failures + 1
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
