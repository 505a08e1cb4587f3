"""The output of a job as it grows, in lines."""

from __future__ import annotations

import re
from pathlib import Path

from rlhf_core.system.secrets import redact
from tasks.launchers.base import LineSink, ProgressSink
from tasks.launchers.remote_output import RemoteOutput

LABEL = re.compile(r"^\s*(\d+): ")  # of `srun --label`: the node's rank
SLURMS_OWN = re.compile(r"^(srun|slurmstepd\S*): ")


class JobOutput:
    """Takes a job's output in pieces; lines go to the log file, to the run and to its progress.

    Attributes:
        offset: bytes taken.
    """

    def __init__(
        self, log: Path, on_output: LineSink, on_progress: ProgressSink, labelled: bool
    ) -> None:
        """Args:
        labelled: lines of nodes start with the node's rank.
        """
        self.log, self.labelled = log, labelled
        self.offset = 0
        self._rest = b""
        self._lines = RemoteOutput(on_output, on_progress)

    def feed(self, piece: bytes, last: bool = False) -> None:
        """Take the next piece.

        Args:
            last: a line without its end is complete too.
        """
        self.offset += len(piece)
        *lines, self._rest = (self._rest + piece).split(b"\n")
        if last and self._rest:
            lines, self._rest = [*lines, self._rest], b""
        with self.log.open("a", encoding="utf-8") as file:
            for raw in lines:
                # of a line with carriage returns (a progress bar) only the last part
                text = raw.rstrip(b"\r").rpartition(b"\r")[2]
                line = redact(text.decode("utf-8", "replace"))
                file.write(line + "\n")
                self._tell(line)

    def _tell(self, line: str) -> None:
        label = LABEL.match(line) if self.labelled else None
        if label is not None:
            line = line[label.end() :]
        if SLURMS_OWN.match(line):
            return  # in the log file; what it means is told by the job's state
        if label is not None and label[1] != "0" and line.strip():
            line = f"node {label[1]}: {line}"
        self._lines(line)
