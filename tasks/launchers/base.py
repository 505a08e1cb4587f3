"""What a launcher is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rlhf_core.jobs import Job

LineSink = Callable[[str], None]
"""Takes one line of the ranks' output; called from a thread of the launcher."""

ProgressSink = Callable[[dict[str, Any]], None]
"""Takes the newest line of metrics.jsonl (step, total, time and the stage's metrics), and now and
then {"usage": Markdown table of what the ranks use}."""


@dataclass(frozen=True)
class Launch:
    """One process group to start.

    Attributes:
        name: for people, such as "sft".
        jobs: job folder (made by the launcher) -> job; they run one after another.
        store: URL of the artifact store.
        log: file that gets every line of output.
    """

    name: str
    jobs: dict[Path, Job]
    store: str
    log: Path


@dataclass(frozen=True)
class Outcome:
    """What one job left in the store."""

    artifact: str
    kind: str
    key: str


class Launcher(Protocol):
    """Starts a launch and waits for its end."""

    def prepare(self) -> None:
        """Begin in the background what the first launch would otherwise wait for."""

    def run(self, launch: Launch, on_line: LineSink, on_progress: ProgressSink) -> list[Outcome]:
        """Returns one outcome per job, in order; leaves no process behind, however it ends.

        Raises:
            JobFailed: the ranks ended without an artifact; its category is the failing rank's own.
        """
