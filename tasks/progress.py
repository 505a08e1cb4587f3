"""Shows a running stage: the newest step, curves, sampled replies, and resource usage."""

from __future__ import annotations

import base64
import re
import time
from typing import Any
from uuid import UUID

from tasks.events import Log, headline, log_event, seconds, table_cell
from tasks.reporting.curves import draw

PROGRESS_SECONDS = 3.0  # between two progress updates
LIVE_SECONDS = 20.0  # between two drawings of the curves
LIVE_LINES = 2000  # newest lines of metrics, of which the curves are drawn
STEP = re.compile(r"step \d+/\d+ ")


class Progress:
    """Shows the newest metrics as events, as a progress artifact, and as a page with curves.

    It is called with lines of metrics.jsonl and samples.jsonl, and with {"usage": text}.
    """

    def __init__(self, stage: str, log: Log) -> None:
        self.stage, self.log = stage, log
        self._first: tuple[float, int] | None = None
        self._artifacts: dict[str, UUID] = {}
        self._shown = 0.0
        self._drawn = time.monotonic()  # a stage that ends within LIVE_SECONDS draws nothing
        self._lines: list[dict[str, Any]] = []
        self._usage = ""
        self._samples: dict[str, Any] = {}

    def __call__(self, line: dict[str, Any]) -> None:
        if "usage" in line:
            self._usage = line["usage"]
            return
        if "samples" in line:
            self._samples = line
            return
        step, total = int(line["step"]), int(line["total"])
        when = time.monotonic()  # a resumed stage's first line is from before
        if self._first is None:
            self._first = (when, step)
        left = None
        if step > self._first[1]:
            left = (when - self._first[0]) / (step - self._first[1]) * (total - step)
        if "text" in line:
            text = str(line["text"])  # another process made it, with the time that is left
        else:
            self._lines = [*self._lines[-LIVE_LINES:], line]
            text = f"step {step}/{total}  {headline(line)}"
            if left is not None and step < total:
                text += f"  {seconds(left)} left"
        if when - self._shown >= PROGRESS_SECONDS or step == total:
            self._shown = when
            log_event(self.log, "progress", self.stage, text, step=step, total=total, left=left)
            self._show("progress", 100.0 * step / max(1, total), text)
        if when - self._drawn >= LIVE_SECONDS and self._lines:
            self._drawn = when
            self._show("live", self.page(text), f"{self.stage} while it runs")

    def page(self, text: str) -> str:
        """Markdown with the newest numbers, curves, replies and resource usage."""
        parts = [f"**{self.stage}**: {text}"]
        if curves := draw({self.stage: self._lines}):
            image = base64.b64encode(curves).decode()
            parts.append(f"![curves so far](data:image/png;base64,{image})")
        if self._samples:
            parts += [f"Replies of step {self._samples['step']}", self._replies()]
        if self._usage:
            parts.append(self._usage)
        return "\n\n".join(parts)

    def _replies(self) -> str:
        rows = ["| prompt | reply | score |", "| --- | --- | ---: |"]
        for sample in self._samples["samples"]:
            cells = [table_cell(sample.get(name, "")) for name in ("prompt", "reply")]
            rows.append(f"| {' | '.join(cells)} | {sample.get('score', '')} |")
        return "\n".join(rows)

    def _show(self, kind: str, data: float | str, description: str) -> None:
        """Create or update the stage's artifact of a kind."""
        from prefect.artifacts import MarkdownArtifact, ProgressArtifact, update_progress_artifact
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.actions import ArtifactUpdate

        try:
            if kind not in self._artifacts:
                # The plain Artifact class would write its data as JSON in a string.
                key = f"{kind}-{self.stage}"
                new: ProgressArtifact | MarkdownArtifact = (
                    ProgressArtifact(progress=float(data), key=key, description=description)
                    if kind == "progress"
                    else MarkdownArtifact(markdown=str(data), key=key, description=description)
                )
                self._artifacts[kind] = new.create().id  # type: ignore[union-attr]
            elif kind == "progress":
                update_progress_artifact(self._artifacts[kind], float(data), description)
            else:
                get_client(sync_client=True).update_artifact(
                    self._artifacts[kind], ArtifactUpdate(data=data, description=description)
                )
        except Exception as error:  # an unavailable server must not end a training
            self.log.warning("%s of %s not shown in Prefect: %s", kind, self.stage, error)


class Lines:
    """Logs the ranks' output, except for lines about steps, which `Progress` shows."""

    def __init__(self, stage: str, log: Log) -> None:
        self.stage, self.log = stage, log

    def __call__(self, line: str) -> None:
        if not STEP.match(line):
            log_event(self.log, "line", self.stage, line)
