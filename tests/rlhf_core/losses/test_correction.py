"""Importance weights: hand values, plain Python as an independent implementation, and what they
are for, a gradient that is nearer to the one of replies sampled from the trained policy."""

import math

import pytest
import torch

from rlhf_core.losses.correction import (
    beyond,
    bounded_weights,
    importance_ratios,
    sampler_divergence,
    weight_metrics,
    weighted,
)
from rlhf_core.losses.group import grpo_loss, rloo_loss

OLD = torch.tensor([[-1.0, -2.0, -0.5], [-1.0, -1.5, 7.0]])
SAMPLER = torch.tensor([[-1.0, -1.0, -2.0], [-1.2, -1.4, -9.0]])
MASK = torch.tensor([[True, True, True], [True, True, False]])
LEVELS = ("token", "sequence")


def test_ratios_by_hand():
    tokens = importance_ratios(OLD, SAMPLER, MASK, "token")
    # log-ratios 0, -1, 1.5 and 0.2, -0.1, padding
    expected = [[1.0, 0.367879, 4.481689], [1.221403, 0.904837, 1.0]]
    torch.testing.assert_close(tokens, torch.tensor(expected), rtol=1e-5, atol=0)
    replies = importance_ratios(OLD, SAMPLER, MASK, "sequence")
    torch.testing.assert_close(replies, torch.tensor([1.648721, 1.105171]), rtol=1e-5, atol=0)


def test_bounds_by_hand():
    ratios = torch.tensor([0.3, 0.5, 1.0, 2.0, 6.0])
    cases = {
        ("truncate", None, 2.0): [0.3, 0.5, 1.0, 2.0, 2.0],  # TIS
        ("truncate", 0.5, 2.0): [0.5, 0.5, 1.0, 2.0, 2.0],
        ("truncate", None, None): [0.3, 0.5, 1.0, 2.0, 6.0],
        ("mask", 0.5, 5.0): [0.0, 0.5, 1.0, 2.0, 0.0],  # IcePop
        ("mask", None, 2.0): [0.3, 0.5, 1.0, 2.0, 0.0],  # MIS, on ratios of sequences
    }
    for (mode, low, high), expected in cases.items():
        assert bounded_weights(ratios, mode, low, high).tolist() == pytest.approx(expected)
    assert beyond(ratios, 0.5, 5.0).tolist() == [True, False, False, False, True]
    assert not beyond(ratios, None, None).any()


def test_ratios_that_overflow_stay_finite_and_are_masked():
    far = torch.tensor([[-500.0, 0.0]])
    ratios = importance_ratios(-far - 1000.0, far, torch.tensor([[True, True]]), "token")
    up = importance_ratios(torch.zeros(1, 1), torch.tensor([[-400.0]]), MASK[:1, :1], "token")
    assert torch.isfinite(ratios).all() and torch.isfinite(up).all()
    assert bounded_weights(up, "mask", None, 2.0).item() == 0.0


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_weights_and_metrics_equal_plain_python(level, mode):
    generator = torch.Generator().manual_seed(5)
    old = -torch.rand(6, 5, generator=generator) * 3
    sampler = old + torch.randn(6, 5, generator=generator) * 0.6
    lengths = [5, 1, 3, 4, 2, 5]
    mask = torch.arange(5) < torch.tensor(lengths).unsqueeze(1)
    low, high = 0.6, 1.5
    # One float at a time, the reply's ratio as a product of quotients of probabilities.
    ratios, weights = [], []
    for o, s, n in zip(old.tolist(), sampler.tolist(), lengths, strict=True):
        each = [math.exp(a) / math.exp(b) for a, b in zip(o[:n], s[:n], strict=True)]
        ratios += [math.prod(each)] if level == "sequence" else each
    for ratio in ratios:
        kept = low <= ratio <= high
        clipped = high if ratio > high else low
        weights.append(ratio if kept else (clipped if mode == "truncate" else 0.0))
    found = importance_ratios(old, sampler, mask, level)
    bounded = bounded_weights(found, mode, low, high)
    picked = bounded if level == "sequence" else bounded[mask]
    assert picked.tolist() == pytest.approx(weights, rel=1e-5)
    metrics = weight_metrics(found, bounded, mask, beyond(found, low, high))
    count = len(ratios)
    expected = {
        "mean": sum(ratios) / count,
        "max": max(ratios),
        "outside": sum(not low <= r <= high for r in ratios) / count,
        "ess": sum(weights) ** 2 / count / sum(w * w for w in weights),
    }
    assert 0 < expected["outside"] < 1, "the bounds are tried"
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(expected, rel=1e-5)


def test_divergence_by_hand():
    found = {k: float(v) for k, v in sampler_divergence(OLD, SAMPLER, MASK).items()}
    # k3 = r - 1 - log r of r = old / sampler: 0, 0.367879, 1.981689, 0.021403, 0.004837
    # squares: 1, 0.135335, 20.085537, 1.491825, 0.818731
    assert found == pytest.approx({"kl": 2.375808 / 5, "chi2": 23.531428 / 5 - 1, "gap_max": 1.5},
                                  rel=1e-5)  # fmt: skip


def test_weights_meet_advantages_of_either_kind():
    rows, tokens = torch.tensor([2.0, -1.0]), torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    assert weighted(rows, None) is rows
    assert weighted(rows, torch.tensor([0.5, 2.0])).tolist() == [1.0, -2.0]
    assert weighted(tokens, torch.tensor([0.5, 2.0])).tolist() == [[0.5, 1.0], [6.0, -8.0]]
    assert weighted(rows, tokens.abs()).tolist() == [[2.0, 4.0], [-3.0, -4.0]]
    assert weighted(tokens, tokens.abs()).tolist() == [[1.0, 4.0], [9.0, -16.0]]


def test_grpo_loss_is_the_sum_of_weighted_tokens():
    """Against a loop over the tokens, with a weight on each, and the KL without."""
    generator = torch.Generator().manual_seed(2)
    new, old, ref = (-torch.rand(2, 3, generator=generator) - 0.5 for _ in range(3))
    advantages, weights = torch.tensor([1.5, -0.7]), torch.rand(2, 3, generator=generator) * 2
    loss, _ = grpo_loss(
        new, old, ref, weighted(advantages, weights), MASK, 0.2, 0.1,
        replies=2.0, tokens=5.0, average="token-mean",
    )  # fmt: skip
    total = 0.0
    for row, column in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]:
        ratio = math.exp(new[row, column] - old[row, column])
        advantage = float(advantages[row])
        surrogate = min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
        log = float(ref[row, column] - new[row, column])
        total += -float(weights[row, column]) * surrogate + 0.1 * (math.exp(log) - 1 - log)
    assert float(loss) == pytest.approx(total / 5, rel=1e-5)


REWARDS = torch.tensor([1.0, 0.0, 0.0, 0.3, -1.0, 0.0, 0.0, 0.5, 2.0])  # of the replies below
REPLIES = torch.cartesian_prod(torch.arange(3), torch.arange(3))  # (9,2)


def expected_gradient(logits, sampler, level, high, corrected=True):
    """Of the loss over replies of a sampler, with respect to the logits (2,3) of each position: all
    replies are summed over."""
    table = logits.clone().requires_grad_()
    new, old, behaviour = (
        x.log_softmax(1)[torch.arange(2), REPLIES] for x in (table, logits, sampler)
    )  # (9,2)
    mask = torch.ones(9, 2, dtype=torch.bool)
    weights = None
    if corrected:
        ratios = importance_ratios(old, behaviour, mask, level)
        weights = bounded_weights(ratios, "truncate", None, high)
    total = torch.zeros(())
    for i, probability in enumerate(behaviour.sum(1).exp()):
        row = slice(i, i + 1)
        advantages = weighted(REWARDS[row], None if weights is None else weights[row])
        if level == "sequence":
            loss, _ = rloo_loss(new[row], old[row], advantages, mask[row], 0.2, replies=1.0)
        else:
            loss, _ = grpo_loss(
                new[row], old[row], old[row], advantages, mask[row], 0.2, 0.0,
                replies=1.0, tokens=1.0, average="token-mean",
            )  # fmt: skip
        total = total + probability * loss
    return torch.autograd.grad(total, table)[0]


@pytest.mark.parametrize("level", LEVELS)
def test_corrected_gradient_is_nearer_in_expectation(level):
    """To that of replies sampled from the trained policy itself."""
    plain, bounded, unbounded = [], [], []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(2, 3, generator=generator)
        sampler = logits + torch.randn(2, 3, generator=generator)
        exact = expected_gradient(logits, logits, level, None, corrected=False)
        for found, high, corrected in ((plain, None, False), (bounded, 2.0, True),
                                       (unbounded, None, True)):  # fmt: skip
            gradient = expected_gradient(logits, sampler, level, high, corrected)
            found.append(float((gradient - exact).norm()))
    assert all(b < p for b, p in zip(bounded, plain, strict=True))
    assert sum(bounded) < 0.5 * sum(plain)
    if level == "sequence":  # the product over the reply leaves nothing out
        assert max(unbounded) < 1e-6 < min(plain)
    else:  # a token's weight knows nothing of the other tokens
        assert 1e-3 < sum(unbounded) < 0.5 * sum(plain)
