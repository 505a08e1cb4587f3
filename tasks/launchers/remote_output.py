"""What a node's agent prints: the ranks' output, and lines `rlhf-progress {JSON}`."""

from __future__ import annotations

import json
from typing import Any

from tasks.launchers.base import LineSink, ProgressSink

MARK = "rlhf-progress "


def progress_line(values: dict[str, Any]) -> str:
    """One line that `RemoteOutput` reads."""
    return MARK + json.dumps(values, ensure_ascii=False)


class RemoteOutput:
    """Takes the lines of agents, in any order of nodes, and tells progress from output."""

    def __init__(self, on_output: LineSink, on_progress: ProgressSink) -> None:
        self.on_output, self.on_progress = on_output, on_progress

    def __call__(self, line: str) -> None:
        """Process one line, with or without its end."""
        line = line.rstrip()
        if line.startswith(MARK):
            try:
                values = json.loads(line.removeprefix(MARK))
            except ValueError:  # cut off, or a rank's own words
                values = None
            if isinstance(values, dict):
                self.on_progress(values)
                return
        if line:
            self.on_output(line)
