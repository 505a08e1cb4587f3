"""Training curves as one PNG with a small panel per quantity."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_core.pipeline.recipe import display_name

Lines = Sequence[Mapping[str, Any]]

# metric -> title; online algorithms have other metrics than the rest
TRAINED = {"loss": "loss", "accuracy": "accuracy in training"}
ONLINE = {
    "score": "score", "gold": "gold score", "kl": "KL to the reference (nats per reply)",
    "length": "length (tokens)", "entropy": "entropy (nats per token)", "value_loss": "value loss",
}  # fmt: skip
BLUE, GREY = "#2563eb", "#9ca3af"


def draw(metrics: Mapping[str, Lines], width: int = 3) -> bytes | None:
    """PNG bytes, or None when no stage has a curve.

    Args:
        metrics: stage -> lines of its metrics.jsonl.
    """
    panels = []
    for stage, lines in metrics.items():
        for name, title in (ONLINE if any("kl" in line for line in lines) else TRAINED).items():
            points = [
                (line["step"], line[name])
                for line in lines
                if isinstance(line.get(name), int | float)
            ]
            if points:
                panels.append((f"{display_name(stage)}: {title}", points))
    if not panels:
        return None
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
    for number, (title, points) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, width, number)
        steps, values = zip(*points, strict=True)
        many = len(points) > 30
        axes.plot(steps, values, color=GREY if many else BLUE, linewidth=1 if many else 1.6,
                  marker="" if len(points) > 12 else "o", markersize=3)  # fmt: skip
        if many:
            axes.plot(steps, smooth(values), color=BLUE, linewidth=1.8)
        axes.set_title(title, fontsize=10)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": ""})
    return buffer.getvalue()


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
