"""What the lengths of replies alone say about which one is preferred."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.training.preference import pair_response_lengths
from rlhf_core.training.probe import logistic


def length_differences(rows: Rows) -> Tensor:
    """Tokens (n,) fp64 by which each pair's chosen response is longer than its rejected one."""
    chosen, rejected = pair_response_lengths(rows).double().unbind(dim=1)
    return chosen - rejected


def length_weight(differences: Tensor, log: Callable[[str], None]) -> float:
    """Logit per token of "the longer reply is the chosen one", by logistic regression on pairs.

    The expert of a product of experts that knows the bias alone (arXiv 1909.03683; for the lengths
    of a reward model's replies 2310.05199). It is fitted first and stays fixed, since lengths could
    otherwise be learned by either expert.

    Args:
        differences: (n,) tokens, see `length_differences`. log: takes a sentence for people.
    """
    scale = differences.square().mean().sqrt()
    if scale == 0:
        log("the replies of every pair are equally long: there is no length to remove")
        return 0.0
    weight = float(logistic((differences / scale).unsqueeze(1), l2=1.0) / scale)
    log(f"length alone: a logit of {100 * weight:+.3g} for 100 more tokens, removed in the loss")
    return weight


def length_correlation(margins: Tensor, differences: Tensor) -> float:
    """Correlation over pairs of the difference of two scores with that of the replies' lengths.

    Which reply of a pair comes first is arbitrary, so both differences have mean 0 by symmetry:
    sum(s l) / sqrt(sum(s^2) sum(l^2)), the same whichever of the two is subtracted.

    Args:
        margins: (n,) chosen - rejected score. differences: (n,) tokens, of the same pairs.

    Returns:
        -1 to 1; 0 where either does not vary.
    """
    scale = (margins.square().sum() * differences.square().sum()).sqrt()
    return float((margins * differences).sum() / scale) if scale > 0 else 0.0
