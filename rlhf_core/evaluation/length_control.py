"""Length-controlled win rate: how often replies would win if both were equally long.

Dubois et al. 2024, "Length-Controlled AlpacaEval" (arXiv 2404.04475), equation 2, without the term
for the difficulty of a prompt, which a single comparison cannot estimate:

    logit P(ours wins) = theta + phi * tanh((length of ours - length of theirs) / sd of the latter)

The rate is sigmoid(theta), in which the lengths do not differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_core.evaluation.intervals import bounds, resampled_counts

RESAMPLES = 500
STEPS = 25  # of Newton's method, which has converged long before
LARGEST = 12.0  # of |theta|: a rate within 1e-5 of 0 or 1, where all replies win or lose


def controlled_win_rate(
    wins: Sequence[float], ours: Sequence[float], theirs: Sequence[float], seed: int
) -> dict[str, float]:
    """The rate and its 95 % interval (bootstrap over prompts), and `length`: phi, which is above 0
    where longer replies win.

    Args:
        wins: 1 ours, 0 theirs, 0.5 a tie. ours, theirs: lengths of the replies in characters.
        seed: of the resampling.
    """
    gap = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)  # (n,)
    scale = gap.std()
    x = np.tanh(gap / scale) if scale > 0 else np.zeros_like(gap)
    y = np.asarray(wins, dtype=float)
    theta, phi = fit(x, y, np.ones((1, len(y))))
    drawn, _ = fit(x, y, resampled_counts(len(y), seed)[:RESAMPLES])
    found = bounds(_sigmoid(drawn))
    return {"rate": float(_sigmoid(theta)[0]), **found, "length": float(phi[0]), "n": len(y)}


def fit(x: Any, y: Any, counts: Any) -> tuple[Any, Any]:
    """theta and phi, (B,) each, that minimise sum of count * cross-entropy + phi² / 2: logistic
    regression with scikit-learn's default penalty, which also keeps phi finite where length alone
    tells who wins.

    Args:
        x: (n,). y: (n,) in [0, 1]. counts: (B,n), how often each row stands in each of B samples.
    """
    theta, phi = np.zeros(len(counts)), np.zeros(len(counts))
    for _ in range(STEPS):
        p = _sigmoid(theta[:, None] + phi[:, None] * x)  # (B,n)
        gradient_theta = (counts * (p - y)).sum(axis=1)  # (B,)
        gradient_phi = (counts * (p - y) * x).sum(axis=1) + phi
        weight = counts * p * (1 - p)
        a = weight.sum(axis=1) + 1e-9
        b = (weight * x).sum(axis=1)
        c = (weight * x * x).sum(axis=1) + 1.0
        determinant = a * c - b * b
        step_theta = (c * gradient_theta - b * gradient_phi) / determinant
        step_phi = (a * gradient_phi - b * gradient_theta) / determinant
        # Newton's steps may overshoot where nearly all replies win
        theta = np.clip(theta - np.clip(step_theta, -2, 2), -LARGEST, LARGEST)
        phi = phi - np.clip(step_phi, -2, 2)
    return theta, phi


def _sigmoid(z: Any) -> Any:
    return 1 / (1 + np.exp(-z))
