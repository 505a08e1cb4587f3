"""How often a reward model prefers the chosen reply of held-out pairs, beside simple baselines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.evaluation import baselines
from rlhf_core.evaluation.statistics import accuracy
from rlhf_core.nn.modules import ScalarModel
from rlhf_core.training.length import length_correlation, length_differences
from rlhf_core.training.scoring import score_all
from rlhf_core.training.strategy import Strategy


def heldout_margins(module: ScalarModel, rows: Rows, strategy: Strategy, micro: int) -> list[float]:
    """chosen - rejected score of every held-out pair."""
    items = rows.take(list(range(len(rows))))
    chosen = [[*r["prompt_ids"], *r["chosen_ids"]] for r in items]
    rejected = [[*r["prompt_ids"], *r["rejected_ids"]] for r in items]
    scores = score_all(module, chosen + rejected, strategy, micro)
    return (scores[: len(items)] - scores[len(items) :]).tolist()


def accuracy_report(
    margins: list[float], train: Rows, heldout: Rows, log: Callable[[str], None]
) -> dict[str, Any]:
    """Held-out accuracy with its interval, beside the baselines', that of each source of a mixture,
    and how far scores go with the replies' lengths; empty without held-out pairs.

    Args:
        margins: chosen - rejected score of every held-out pair.
        log: takes a sentence for people.
    """
    if not margins:
        return {}
    known, unknown = (
        [(r["chosen"], r["rejected"]) for r in rows.take(list(range(len(rows))))]
        for rows in (train, heldout)
    )
    report: dict[str, Any] = {
        **accuracy(margins),
        "baselines": {
            "length": accuracy(baselines.length_margins(known, unknown)),
            "bag_of_words": accuracy(baselines.bag_of_words_margins(known, unknown)),
        },
        "length_correlation": length_correlation(
            torch.tensor(margins, dtype=torch.float64), length_differences(heldout)
        ),
    }
    if heldout.sources:
        report["sources"] = {
            name: accuracy([margins[number] for number in numbers])
            for name, numbers in heldout.sources.items()
            if len(numbers)
        }
    log(
        f"held-out accuracy {report['accuracy']:.3f} "
        f"[{report['low']:.3f}, {report['high']:.3f}] on {report['n']} pairs; baselines: "
        + ", ".join(f"{k} {v['accuracy']:.3f}" for k, v in report["baselines"].items())
        + f"; correlation of score and length {report['length_correlation']:+.2f}"
    )
    return report
