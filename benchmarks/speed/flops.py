"""Model FLOPs: what the arithmetic of the model needs, however it is computed.

2 per weight and token in a forward pass and twice that in a backward pass; the vocabulary head
only where a loss reads it; attention 2 S^2 d per layer of a causal row of S tokens. Nothing that is
computed again, so the prompt of a preference pair counts once; no padding.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any


def share(
    row: str, values: dict[str, Any], runs: list[dict[str, Any]], peak: float
) -> float | None:
    """Share of the peak (FLOP/s) that the median run used; None where it is not defined."""
    if row not in ("sft", "reward", "scoring"):
        return None
    sizes = values["sizes"]
    shape = values["shape"]
    seconds = statistics.median(r["seconds"] for r in runs)
    if row == "reward":
        pairs = sizes.measured(values["pairs"], sizes.batch // 2)
        prompts = [len(r["prompt_ids"]) for r in pairs]
        rows = [p + len(r[k]) for p, r in zip(prompts, pairs, strict=True)
                for k in ("chosen_ids", "rejected_ids")]  # fmt: skip
        work = 3 * (forward(shape, rows, 0) - forward(shape, prompts, 0))
    else:
        rows = values["sft"]
        rows = sizes.measured(rows, sizes.batch) if row == "sft" else rows[: 2 * sizes.batch]
        loss_mask = sum(sum(r["trainable"][1:]) for r in rows)
        work = forward(shape, [len(r["input_ids"]) for r in rows], loss_mask)
        work *= 3 if row == "sft" else 1
    return work / seconds / peak


def forward(shape: dict[str, int], lengths: list[int], loss_mask: int) -> float:
    """FLOPs of a forward pass over rows of these lengths with `loss_mask` positions' logits."""
    attention = sum(2 * n * n * shape["width"] * shape["layers"] for n in lengths)
    return 2 * shape["body"] * sum(lengths) + 2 * shape["head"] * loss_mask + attention


def shape_of(folder: Path) -> dict[str, int]:
    """Weights in matrix products, by a llama's configuration."""
    config = json.loads((folder / "config.json").read_text())
    d, layers = config["hidden_size"], config["num_hidden_layers"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    inner = heads * (config.get("head_dim") or d // heads)
    attention = 2 * d * inner + 2 * d * inner * kv // heads
    return {
        "body": layers * (attention + 3 * d * config["intermediate_size"]),
        "head": config["vocab_size"] * d, "width": inner, "layers": layers,
    }  # fmt: skip
