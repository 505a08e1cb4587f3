"""The benchmark's table and picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PEERS = {
    "sft": "TRL SFTTrainer", "reward": "TRL RewardTrainer", "grpo": "TRL GRPOTrainer",
    "ppo": "TRL PPOTrainer",
    "ppo-top": "TRL PPOTrainer", "rollout": "generate", "scoring": "whole logits",
}  # fmt: skip
MIB = 2**20


def line(name: str, found: dict[str, Any]) -> str:
    """A row for the terminal."""
    ours, theirs = found["ours"], found["theirs"]
    gap = found["losses"].get("relative")
    return (
        f"{name}: {ours['rate']:.0f} tokens/s beside {theirs['rate']:.0f}, ratio "
        f"{ratio(found)}; memory {ours['rss'] / MIB:.0f} MiB beside "
        f"{theirs['rss'] / MIB:.0f}"
        + ("" if gap is None else f"; losses differ by {gap:.1e} of the largest")
    )


def ratio(found: dict[str, Any]) -> str:
    """Of both sides' rates, with its quartiles."""
    low, high = found["quartiles"]
    return f"{found['ratio']:.2f} ({low:.2f} to {high:.2f})"


def write(results: dict[str, dict[str, Any]], folder: Path) -> None:
    """table.md and picture.png."""
    (folder / "table.md").write_text(table(results))
    picture(results, folder / "picture.png")


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| | beside | tokens/s, ours | theirs | ratio | peak memory, ours | theirs "
        "| share of peak, ours | theirs | losses differ by |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, r in results.items():
        row = name.split()[0]
        rates = [f"{s['rate']:,.0f} ({s['low']:,.0f} to {s['high']:,.0f})"
                 for s in (r["ours"], r["theirs"])]  # fmt: skip
        memory = [f"{s['rss'] / MIB:,.0f} MiB" for s in (r["ours"], r["theirs"])]
        shares = [f"{x:.0%}" if (x := r["share"][s]) else "" for s in ("ours", "theirs")]
        gap = r["losses"].get("relative")
        cells = [f"{name}, {r['precision']}", PEERS[row], *rates, f"**{ratio(r)}**", *memory,
                 *shares, "" if gap is None else f"{gap:.0e}"]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def picture(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Ratios as bars, with their quartiles."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(results)[::-1]
    ratios = [results[n]["ratio"] for n in names]
    spread = [[abs(results[n]["quartiles"][k] - results[n]["ratio"]) for n in names]
              for k in (0, 1)]  # fmt: skip
    figure, axes = plt.subplots(figsize=(8, 0.45 * len(names) + 1.2), dpi=120)
    bars = axes.barh(names, ratios, xerr=spread, color="#3b7dd8", ecolor="#222222", height=0.6)
    axes.bar_label(bars, labels=[f"{r:.2f}x" for r in ratios], padding=6)
    axes.axvline(1.0, color="#888888", linewidth=1)
    axes.set_xlabel("tokens per second, times the peer's (TRL; transformers for rollout, scoring)")
    axes.set_xlim(0, max(ratios) * 1.18)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
