"""Training curves as one PNG with a small panel per quantity."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

Lines = Sequence[Mapping[str, Any]]

# stage -> (metric, title, also drawn in the same panel)
PANELS: tuple[tuple[str, str, str], ...] = (
    ("sft", "loss", "SFT: loss (nats a token)"),
    ("reward", "loss", "reward model: loss"),
    ("reward", "accuracy", "reward model: accuracy in training"),
    ("ppo", "score", "PPO: score of the reward model"),
    ("ppo", "gold", "PPO: gold score"),
    ("ppo", "kl", "PPO: KL to SFT (nats a reply)"),
    ("ppo", "length", "PPO: length (tokens)"),
    ("ppo", "entropy", "PPO: entropy (nats a token)"),
    ("ppo", "value_loss", "PPO: value loss"),
)
BLUE, GREY = "#2563eb", "#9ca3af"


def draw(metrics: Mapping[str, Lines], width: int = 3) -> bytes | None:
    """PNG bytes, or None when no stage has a curve.

    Args:
        metrics: stage -> lines of its metrics.jsonl.
    """
    panels = []
    for stage, name, title in PANELS:
        points = [
            (line["step"], line[name])
            for line in metrics.get(stage, ())
            if isinstance(line.get(name), int | float)
        ]
        if points:
            panels.append((title, points))
    if not panels:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    width = min(width, len(panels))
    rows = -(-len(panels) // width)
    figure = Figure(figsize=(4.0 * width, 2.5 * rows), layout="constrained")
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


def smooth(values: Sequence[float], weight: float = 0.75) -> list[float]:
    """Exponential moving average, corrected for its start."""
    result, mean, total = [], 0.0, 0.0
    for value in values:
        mean = weight * mean + (1 - weight) * value
        total = weight * total + (1 - weight)
        result.append(mean / total)
    return result
