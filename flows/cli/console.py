"""The terminal output of a run: the events of `tasks.events`, one line each.

On a terminal, progress is rewritten in the last line; in a file, it is a line from time to time.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from typing import Any, TextIO

from rlhf_core.system.printable import printable
from tasks.events import headline, seconds

PROGRESS_SECONDS = 8.0  # between two lines of progress in a file
NAME_WIDTH = 16


class Console(logging.Handler):
    """Prints run events, and warnings of other loggers; not Prefect's records about failed runs,
    since the command prints the error itself."""

    def __init__(
        self, stream: TextIO | None = None, verbose: bool = False, link: bool = False
    ) -> None:
        super().__init__()
        self.out = stream or sys.stdout
        self.verbose = verbose
        self.link = link  # whether to print the run's URL: only if the server outlives the run
        self.live = self.out.isatty() and os.environ.get("TERM") != "dumb"
        self.colour = self.live and "NO_COLOR" not in os.environ
        self._transient = False
        self._progress_shown = 0.0
        self._unicode = "utf" in (self.out.encoding or "").lower()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            event = getattr(record, "rlhf", None)
            if isinstance(event, dict):
                texts = {k: printable(v) for k, v in event.items() if isinstance(v, str)}
                self._print_event({**event, **texts})
            elif record.levelno >= logging.WARNING and not record.name.startswith(
                ("prefect.flow_runs", "prefect.task_runs", "prefect.flow_engine")
            ):
                self.line(self._paint("33", f"  {record.name}: {printable(record.getMessage())}"))
        except Exception:
            self.handleError(record)

    def _print_event(self, event: dict[str, Any]) -> None:
        kind, stage, text = event["kind"], event["stage"], event["text"]
        if kind == "run":
            self.line(f"  run       {event['id']}")
            if self.link and event.get("url"):
                self.line(f"  watch     {event['url']}")
            self.line("")
        elif kind == "start":
            self._stage("·", stage, text, "36")
        elif kind == "progress":
            self._print_progress(stage, text)
        elif kind == "done":
            reused = event["reused"]
            took = "reused" if reused else seconds(event["seconds"])
            shown = f"{took:<13}{event['ref']:<28} {headline(event['metrics'])}".rstrip()
            self._stage("=" if reused else "✓", stage, shown, "2" if reused else "32")
        elif kind in ("retry", "warning"):
            self._stage("!", stage, text, "33")
        elif kind == "note" and stage != "report":
            self._stage("✓", stage, text, "32")
        elif kind == "line" and (self.verbose or not text.startswith("ERROR (")):
            self.line(self._paint("2", f"      {text}"))

    def _print_progress(self, stage: str, text: str) -> None:
        line = f"  {stage:<{NAME_WIDTH - 1}} {text}"
        if self.live:
            width = shutil.get_terminal_size().columns
            self.out.write(f"\r\x1b[2K{line[: width - 1]}")
            self.out.flush()
            self._transient = True
        elif time.monotonic() - self._progress_shown >= PROGRESS_SECONDS:
            self._progress_shown = time.monotonic()
            self.line(line)

    def _stage(self, mark: str, stage: str, text: str, colour: str) -> None:
        if not self._unicode:
            mark = {"✓": "+", "·": "-"}.get(mark, mark)
        self.line(f"{self._paint(colour, mark)} {stage:<{NAME_WIDTH - 1}} {text}")

    def line(self, text: str) -> None:
        """Print a line that is not rewritten."""
        if self._transient:
            self.out.write("\r\x1b[2K")
            self._transient = False
        if not self._unicode:
            encoding = self.out.encoding or "ascii"
            text = text.replace("→", "->").encode(encoding, "replace").decode(encoding)
        self.out.write(text + "\n")
        self.out.flush()

    def _paint(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour else text


def install_console(console: Console) -> None:
    """Replace Prefect's console handler. Logging to the Prefect server is not changed."""
    from prefect.logging.configuration import setup_logging

    setup_logging()
    root = logging.getLogger()
    root.handlers = [console]
