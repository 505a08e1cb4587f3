"""A linear probe as the start of a reward head: linear probing, then fine-tuning (LP-FT).

Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution",
arXiv 2202.10054. With few pairs a random head drags the model's features along while it finds its
direction; a head that was fitted to the untouched features first does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.nn.modules import ScalarModel, last_real
from rlhf_core.nn.sharded import assign
from rlhf_core.runtime.context import StageContext
from rlhf_core.training.batching import scoring_passes
from rlhf_core.training.preference import collate_pairs, pair_length
from rlhf_core.training.strategy import Strategy

PENALTIES = (100.0, 300.0, 1000.0, 3000.0, 10000.0)
FOLDS = 4


def fit_probe(
    chosen: Tensor, rejected: Tensor, prompts: Sequence[str]
) -> tuple[Tensor, float, float]:
    """Logistic regression on feature differences, penalty chosen by cross-validation.

    Features are divided by their standard deviation for the fit, and the weights scaled back.
    Folds are cut between prompts, since pairs of one prompt share replies.

    Args:
        chosen, rejected: (n,d). prompts: n texts; equal ones stay in one fold.

    Returns:
        weight (d,), the penalty on its squared (scaled) entries, and the accuracy that the
        cross-validation measured with it.
    """
    difference = (chosen - rejected).double()  # (n,d)
    scale = difference.std(dim=0, unbiased=False).clamp(min=1e-6)
    x = difference / scale
    names = sorted(set(prompts))
    fold_of = {name: i % FOLDS for i, name in enumerate(names)}
    folds = torch.tensor([fold_of[p] for p in prompts])
    best_l2, best = PENALTIES[len(PENALTIES) // 2], -1.0
    if len(names) >= FOLDS:
        for l2 in PENALTIES:
            right = 0
            for fold in range(FOLDS):
                weight = logistic(x[folds != fold], l2)
                right += int((x[folds == fold] @ weight > 0).sum())
            if right / len(x) > best:
                best_l2, best = l2, right / len(x)
    return (logistic(x, best_l2) / scale).float(), best_l2, best


def logistic(x: Tensor, l2: float) -> Tensor:
    """Minimum of sum softplus(-x w) + l2 |w|^2 / 2 over w (d,)."""
    weight = torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight],
        max_iter=300,
        tolerance_grad=1e-9,
        tolerance_change=1e-13,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.softplus(-(x @ weight)).sum() + 0.5 * l2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return weight.detach()


@torch.no_grad()
def probe_head(
    module: ScalarModel, train: Rows, strategy: Strategy, micro: int, context: StageContext
) -> None:
    """Start the head as a linear probe on the untrained model, computed by all ranks together.

    Before the module is prepared, or where it is sharded after that.
    """
    group = strategy.group
    strategy.place(module)
    rows = train.take(list(range(len(train))))
    found: list[tuple[int, Tensor]] = []
    lengths = [pair_length(row) for row in rows]
    for positions, counts in scoring_passes(lengths, group, 2 * micro):
        input_ids, mask, index = collate_pairs([rows[p] for p in positions], group.device)
        with strategy.autocast():
            states = module.states(input_ids, mask, index).float()  # (2b,S,d)
        last = last_real(mask)
        pooled = states[torch.arange(len(last), device=group.device), last].cpu()  # (2b,d)
        chosen, rejected = pooled.chunk(2)
        if not counts:
            continue
        found += [
            (p, torch.stack(pair)) for p, *pair in zip(positions, chosen, rejected, strict=True)
        ]
    pairs = torch.stack(group.in_order(found))  # (n,2,d)
    with torch.enable_grad():
        weight, l2, accuracy = fit_probe(pairs[:, 0], pairs[:, 1], [r["prompt"] for r in rows])
    assign(module, {"head.weight": weight.unsqueeze(0), "head.bias": torch.zeros(1)})
    context.log(f"probe on {len(rows)} pairs: cross-validated accuracy {accuracy:.3f} (l2 {l2:g})")
