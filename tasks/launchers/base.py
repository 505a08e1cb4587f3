"""The interface of launchers: `Launch` in, `Outcome` out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rlhf_core.jobs import Job, Priority

LineSink = Callable[[str], None]
"""Takes one line of the ranks' output; called from a thread of the launcher."""

ProgressSink = Callable[[dict[str, Any]], None]
"""Takes the newest line of metrics.jsonl (step, total, time and the stage's metrics), and from time
to time {"usage": Markdown table of the ranks' memory and CPU load}, or {"waiting": what a stage
waits for, None when it has started}."""


@dataclass(frozen=True)
class Launch:
    """One process group to start.

    Attributes:
        name: of the stage, such as "sft"; for messages.
        jobs: job folder (made by the launcher) -> job; the jobs run one after another.
        store: URL of the artifact store.
        log: file that gets all output.
        priority, author: of the run, for the order in a queue.
    """

    name: str
    jobs: dict[Path, Job]
    store: str
    log: Path
    priority: Priority = "normal"
    author: str = ""


@dataclass(frozen=True)
class Outcome:
    """The result of one job: an artifact in the store."""

    artifact: str
    kind: str
    key: str


class Launcher(Protocol):
    """Starts a launch and waits for its results."""

    def prepare(self) -> None:
        """Start work in the background that the first launch would otherwise wait for."""

    def run(self, launch: Launch, on_output: LineSink, on_progress: ProgressSink) -> list[Outcome]:
        """Run the jobs; returns one outcome per job, in order. Leaves no process behind.

        Args:
            on_output: gets each line of the ranks' output.
            on_progress: gets metrics and resource usage.

        Raises:
            JobFailed: a job has no result; the category is that of the rank that failed.
        """
