"""Reports what a stage waits for that has not started."""

from __future__ import annotations

import time
from collections.abc import Callable

from rlhf_core.errors import JobFailed
from tasks.launchers.base import LineSink, ProgressSink

REPORT_SECONDS = 60.0  # between two messages
FIRST_SECONDS = 10.0  # before the first one


class Waits:
    """Messages while a stage waits, and the end of its patience."""

    def __init__(
        self, timeout: float, advice: str, on_output: LineSink, on_progress: ProgressSink
    ) -> None:
        """Args:
        timeout: `launcher.queue_timeout`. advice: what it waited for in vain, and what to do.
        """
        self.timeout, self.advice = timeout, advice
        self.on_output, self.on_progress = on_output, on_progress
        self.began = time.monotonic()
        self.reported = self.began - REPORT_SECONDS + FIRST_SECONDS
        self.told = False

    def report(self, why: Callable[[], str]) -> bool:
        """Call while it waits; True if it was time for a report.

        Args:
            why: gives what it waits for; "" if that is not known now.

        Raises:
            JobFailed: it has waited for longer than `timeout`.
        """
        now = time.monotonic()
        if now - self.began > self.timeout:
            raise JobFailed(self.advice, category="queue")
        if now - self.reported < REPORT_SECONDS:
            return False
        self.reported, self.told = now, True
        if text := why():
            self.on_output(f"waiting: {text}")
            self.on_progress({"waiting": text})
        return True

    def over(self) -> None:
        """Call when it has started."""
        self.began = time.monotonic()
        if self.told:
            self.told = False
            self.on_progress({"waiting": None})


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 11th."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10)
    return f"{number}{ending or 'th'}"
