"""Training curves as one PNG with a small panel per quantity."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_core.pipeline.recipe import display_name
from rlhf_core.store import Store
from tasks.reporting.files import read_lines

Lines = Sequence[Mapping[str, Any]]
Points = list[tuple[float, float]]

# metric -> title; online algorithms have other metrics than the rest
TRAINED = {
    "loss": "loss", "heldout_loss": "held-out loss", "accuracy": "accuracy in training",
}  # fmt: skip
ONLINE = {
    "score": "score", "gold": "gold score", "kl": "KL to the reference (nats per reply)",
    "length": "length (tokens)", "entropy": "entropy (nats per token)", "value_loss": "value loss",
    "top_opening": "share of the most common opening", "distinct_2": "distinct-2",
}  # fmt: skip
GAIN = "held-out gain against KL (nats)"  # of the evaluations in training, in their order
COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2")
GREY = "#9ca3af"


def draw(metrics: Mapping[str, Lines], width: int = 3) -> bytes | None:
    """PNG bytes, or None when no stage has a curve.

    Args:
        metrics: stage -> lines of its metrics.jsonl.
    """
    panels = {title: {"": points} for title, points in _panels(metrics).items()}
    return _draw(panels, width) if panels else None


def of_rollout(line: Mapping[str, Any]) -> bool:
    """Whether a line of metrics is of a rollout: of its scores, or of its compared pairs."""
    return bool({"score", "reward", "ties"} & line.keys())


def overlay(runs: Mapping[str, Mapping[str, Lines]], width: int = 2) -> bytes | None:
    """The curves of several runs over each other, as `draw`.

    Args:
        runs: run -> stage -> lines of its metrics.jsonl.
    """
    panels: dict[str, dict[str, Points]] = {}
    for run, metrics in runs.items():
        for title, points in _panels(metrics).items():
            known = panels.setdefault(title, {})
            if points not in known.values():  # a stage that both have reused is one curve
                known[run] = points
    return _draw(panels, width) if panels else None


def _panels(metrics: Mapping[str, Lines]) -> dict[str, Points]:
    """Title -> the curve: a metric by step, or the gain of evaluations in training by their KL."""
    panels = {}
    for stage, lines in metrics.items():
        for name, title in (ONLINE if any(map(of_rollout, lines)) else TRAINED).items():
            points = [
                (line["step"], line[name])
                for line in lines
                if isinstance(line.get(name), int | float)
            ]
            if points:
                panels[f"{display_name(stage)}: {title}"] = points
        evaluated = [line for line in lines if {"heldout_reward", "heldout_kl"} <= line.keys()]
        if evaluated:
            start = evaluated[0]["heldout_reward"]  # of the untrained policy
            gains = [(line["heldout_kl"], line["heldout_reward"] - start) for line in evaluated]
            panels[f"{display_name(stage)}: {GAIN}"] = gains
    return panels


def _draw(panels: Mapping[str, Mapping[str, Points]], width: int) -> bytes:
    """PNG bytes.

    Args:
        panels: title -> label of each curve -> its points; a panel with one curve has no legend.
    """
    prepare()
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    width = min(width, len(panels))
    rows = -(-len(panels) // width)
    figure = Figure(figsize=(4.0 * width, 2.5 * rows))
    # Margins in inches: an automatic layout would draw everything twice to measure the texts.
    figure.subplots_adjust(
        left=0.5 / (4.0 * width), right=1 - 0.1 / (4.0 * width), wspace=0.5 / 3.4,
        bottom=0.3 / (2.5 * rows), top=1 - 0.3 / (2.5 * rows), hspace=0.6 / 1.9,
    )  # fmt: skip
    labels = list(dict.fromkeys(label for curves in panels.values() for label in curves))
    for number, (title, curves) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, width, number)
        steps = not title.endswith(GAIN)
        for label, points in curves.items():
            colour = COLOURS[labels.index(label) % len(COLOURS)]
            _plot(axes, points, colour, label, many=steps and len(points) > 30)
        axes.set_title(title, fontsize=10)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=steps))
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        if len(labels) > 1:
            axes.legend(fontsize=7, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": ""})
    return buffer.getvalue()


def _plot(axes: Any, points: Points, colour: str, label: str, *, many: bool) -> None:
    """One curve; a smoothed one over it where there are many points."""
    steps, values = zip(*points, strict=True)
    raw = GREY if not label else colour
    axes.plot(steps, values, color=raw if many else colour, linewidth=1 if many else 1.6,
              alpha=0.3 if many and label else 1, label=None if many else label or None,
              marker="" if len(points) > 12 else "o", markersize=3)  # fmt: skip
    if many:
        axes.plot(steps, smooth(values), color=colour, linewidth=1.8, label=label or None)


def read_metrics(store: Store, digest: str) -> list[dict[str, Any]]:
    """metrics.jsonl of an artifact; see `read_lines`."""
    return read_lines(store, digest, "metrics.jsonl")


def prepare() -> None:
    """Import what `draw` needs, which takes a second; flows do it while ranks are working."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.figure


def smooth(values: Sequence[float], weight: float = 0.75) -> list[float]:
    """Exponential moving average with bias correction."""
    result, mean, total = [], 0.0, 0.0
    for value in values:
        mean = weight * mean + (1 - weight) * value
        total = weight * total + (1 - weight)
        result.append(mean / total)
    return result
