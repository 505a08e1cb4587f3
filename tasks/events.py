"""Events of a run, as log records.

Prefect's log shows the record's text. The attribute `rlhf` has the same as data, which the console
of `rlhf run` shows; records without it are Prefect's own.
"""

from __future__ import annotations

import html
import logging
import re
import sys
from typing import Any, Literal

Kind = Literal["run", "start", "line", "progress", "done", "retry", "note", "warning", "failed"]
Log = logging.Logger | logging.LoggerAdapter[Any]


def log_event(log: Log, kind: Kind, stage: str, text: str, **fields: Any) -> None:
    """Log one event of a stage."""
    level = logging.WARNING if kind in ("retry", "warning") else logging.INFO
    shown = text if kind == "line" or not stage else f"{stage}: {text}"
    event = {"kind": kind, "stage": stage, "text": text, **fields}
    log.log(level, "%s", shown, extra={"rlhf": event})


def seconds(value: float) -> str:
    """A duration as text: 0.3 s, 42 s, 3 min 20 s."""
    if value < 9.95:
        return f"{value:.1f} s"
    if value < 120:
        return f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


PROGRESS = re.compile(r"(?:[a-z_-]+: )?(step (\d+)/(\d+)(?:  .*)?)")


def parse_progress(message: str) -> dict[str, Any] | None:
    """The numbers of a progress message that another process logged; None for other messages."""
    match = PROGRESS.fullmatch(message)
    if match is None:
        return None
    return {"step": int(match[2]), "total": int(match[3]), "text": match[1]}


# Metrics of the headline, in order; a stage has some of them.
HEADLINES = (
    ("loss", "loss"), ("heldout_loss", "held-out loss"), ("accuracy", "accuracy"),
    ("score", "score"), ("gold", "gold"),
    ("kl", "KL"), ("length", "length"), ("tokens_per_second", "tokens/s"),
)  # fmt: skip


def headline(metrics: dict[str, Any]) -> str:
    """The main numbers of a stage in one line."""
    shown = []
    if "read" in metrics and "kept" in metrics:  # a data set
        return f"{metrics['kept']:,} of {metrics['read']:,} rows"
    if "train_pairs" in metrics:  # the label stage
        return f"{metrics['train_pairs']:,} pairs, {metrics.get('heldout_pairs', 0):,} held out"
    if "train_replies" in metrics:  # the best of n
        replies, held_out = metrics["train_replies"], metrics.get("heldout_replies", 0)
        return f"{replies:,} replies kept, {held_out:,} held out"
    heldout = metrics.get("heldout")
    if isinstance(heldout, dict) and "accuracy" in heldout:  # a reward model
        interval = f" ({heldout['low']:.2f} to {heldout['high']:.2f})" if "low" in heldout else ""
        shown.append(f"held-out accuracy {heldout['accuracy']:.2f}{interval}")
    if isinstance(best := metrics.get("best"), dict) and "step" in best:  # of its evaluations
        over = "" if best.get("within", True) else ", above kl_budget"
        shown.append(f"best at step {best['step']}{over}")
    models = metrics.get("models")  # an evaluation
    if isinstance(models, dict) and "policy" in models:
        start = "sft" if "sft" in models else "base"
        for name in ("reward", "gold"):
            pair = [(models.get(m) or {}).get(f"{name}_mean") for m in (start, "policy")]
            if None not in pair:
                shown.append(f"{name} {pair[0]:.3f} → {pair[1]:.3f}")
    shown += _benchmarks(metrics)
    for name, label in HEADLINES:
        value = metrics.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            number = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
            shown.append(f"{number} {label}" if label == "tokens/s" else f"{label} {number}")
    return "  ".join(shown)


def _benchmarks(metrics: dict[str, Any]) -> list[str]:
    """The first metric of the first tasks, of base and final model."""
    models, found = metrics.get("models") or {}, []
    for task in (metrics.get("shown") or [])[:3]:
        before, after = ((models.get(name) or {}).get(task) or {} for name in ("base", "policy"))
        key = next(iter(after), "")
        pair = [(row.get(key) or {}).get("value") for row in (before, after)]
        if None not in pair:
            found.append(f"{task} {key.partition(',')[0]} {pair[0]:.3g} → {pair[1]:.3g}")
    return found


def table_cell(text: object, limit: int = 400) -> str:
    """Escape a text for one cell of a Markdown table, so that it has no Markdown or HTML, and no
    control characters, which a model can write and a database may refuse."""
    plain = re.sub(r"[\x00-\x1f\x7f]", "\ufffd", " ".join(str(text).split()))
    plain = plain if len(plain) <= limit else plain[: limit - 1] + "…"
    plain = html.escape(plain, quote=False)
    return re.sub(r"([\\`*_\[\]|~$#!])", r"\\\1", plain) or "*(empty)*"


BOILERPLATE = re.compile(
    r"Worker '.*' submitting flow run '|Flow run '.*' submitted to infrastructure$"
    r"|Running \d+ deployment pull step|Executing deployment step: |Deployment step '.*' completed"
    r"|All deployment steps completed|Beginning (sub)?flow run '"
    r"|Finished in state (Completed|Cached|Running)\("
    r"|Finished in state Crashed\('Execution was aborted by a termination signal"
)
"""Beginnings of what Prefect logs about every run, whatever it does."""


class PrefectsOwn(logging.Filter):
    """Tidies the records of Prefect's engine.

    Boilerplate is dropped. An error with a message for the user is that message, without its
    traceback; when a flow returns a failed state, the engine logs the state and then an exception,
    of which the second is dropped. A signal, as of a cancellation, is no crash.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        from prefect.exceptions import FailedRun, TerminationSignal

        from rlhf_core.errors import RLHFError

        if BOILERPLATE.match(message := record.getMessage()):
            return False
        stopped = isinstance(sys.exc_info()[1], TerminationSignal | KeyboardInterrupt)
        if stopped and message.startswith("Crash detected!"):
            record.levelno, record.levelname = logging.INFO, "INFO"
            record.msg, record.args = "stopped by a signal: cancelled, or its machine stops", ()
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, FailedRun):
            return False
        if isinstance(error, RLHFError):
            record.exc_info = record.exc_text = None
            record.msg, record.args = "%s", (str(error),)
        return True


def tidy_logs() -> None:
    """Install `PrefectsOwn` on the loggers of flow and task runs."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logger = logging.getLogger(name)
        if not any(isinstance(f, PrefectsOwn) for f in logger.filters):
            logger.addFilter(PrefectsOwn())
