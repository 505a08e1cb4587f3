"""Hand-computed values of the surrogates, and what their gradients and those of the KL are."""

import math
from typing import get_args

import pytest
import torch

from rlhf_core.losses.group import grpo_loss, rloo_loss
from rlhf_core.losses.ppo import kl_loss, ppo_policy_loss
from rlhf_core.losses.reductions import Average, averaging_weights
from rlhf_core.losses.surrogate import Objective

NAN = float("nan")
# Probabilities of four tokens, whose ratios are 1.3, 0.5, 4 and 1.025; the fifth is padding.
NEW = [0.65, 0.1, 0.4, 0.41]
OLD = [0.5, 0.2, 0.1, 0.4]
ADVANTAGES = torch.tensor([[1.0, -1.0, -2.0, 1.0, NAN]])
MASK = torch.tensor([[True, True, True, True, False]])


def log(probabilities):
    return torch.tensor([[*(math.log(p) for p in probabilities), NAN]])


@pytest.mark.parametrize(
    ("settings", "values", "gradient", "fractions"),
    [
        # The third token's advantage is negative and its ratio high: only dual_clip stops it.
        ({"clip_range": 0.2}, [-1.2, 0.8, 8, -1.025], [0, 0, 8, -1.025], (0.25, 0.25)),
        ({"clip_range": 0.2, "clip_range_high": 0.28}, [-1.28, 0.8, 8, -1.025],
         [0, 0, 8, -1.025], (0.25, 0.25)),
        ({"clip_range": 0.6, "clip_range_high": 0.28}, [-1.28, 0.5, 8, -1.025],
         [0, 0.5, 8, -1.025], (0.0, 0.25)),
        ({"clip_range": 0.2, "clip_range_high": 0.4}, [-1.3, 0.8, 8, -1.025],
         [-1.3, 0, 8, -1.025], (0.25, 0.0)),
        ({"clip_range": 0.2, "dual_clip": 3.0}, [-1.2, 0.8, 6, -1.025], [0, 0, 0, -1.025],
         (0.25, 0.25)),
        ({"objective": "cispo", "clip_range": 0.2, "clip_range_high": 1.0},
         [-1.3 * math.log(0.65), 0.5 * math.log(0.1), 4 * math.log(0.4), -1.025 * math.log(0.41)],
         [-1.3, 0.5, 4, -1.025], (0.0, 0.25)),
        # The probabilities change by 0.15, -0.1, 0.3 and 0.01.
        ({"objective": "dppo", "clip_range": 0.12}, [0, 0.5, 8, -1.025],
         [0, 0.5, 8, -1.025], (0.0, 0.25)),
        ({"objective": "dppo", "clip_range": 0.05, "clip_range_high": 0.2},
         [-1.3, 0, 8, -1.025], [-1.3, 0, 8, -1.025], (0.25, 0.0)),
        ({"objective": "dppo", "clip_range": 0.2, "dual_clip": 2.0},
         [-1.3, 0.5, 4, -1.025], [-1.3, 0.5, 0, -1.025], (0.0, 0.0)),
    ],
)  # fmt: skip
def test_surrogate_of_a_token_matches_hand_values(settings, values, gradient, fractions):
    logprobs = log(NEW).requires_grad_()
    loss, metrics = ppo_policy_loss(logprobs, log(OLD), ADVANTAGES, MASK, **settings)
    loss.backward()
    assert loss.item() == pytest.approx(sum(values) / 4, abs=1e-6)
    want = torch.tensor([[*gradient, 0.0]]) / 4
    torch.testing.assert_close(logprobs.grad, want, atol=1e-6, rtol=0)
    low, high = metrics["clip_fraction_low"], metrics["clip_fraction_high"]
    assert (low.item(), high.item()) == fractions
    dual = metrics.get("dual_clip_fraction", torch.tensor(0.0))
    assert (dual.item() > 0) == ("dual_clip" in settings)
    assert metrics["clip_fraction"] == low + high + dual


@pytest.mark.parametrize("objective", get_args(Objective))
def test_token_without_an_advantage_has_no_gradient_whatever_its_ratio(objective):
    """A mask of the rollout correction makes advantages 0 where policy and sampler differ most."""
    logprobs = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    old = torch.tensor([[-120.0, -1.0]])  # the ratio is more than fp32 can hold
    mask = torch.tensor([[True, objective != "gspo"]])  # gspo has one ratio for both
    loss, _ = ppo_policy_loss(
        logprobs, old, torch.tensor([[0.0, 1.0]]), mask, 0.2, objective=objective
    )
    loss.backward()
    assert loss.isfinite() and logprobs.grad.isfinite().all()
    assert logprobs.grad[0, 0] == 0


# Two replies of three tokens and one; the ratio of the first is 2.6^(1/3) = 1.375069, of the
# second 1.025.
LOGPROBS = torch.tensor([[math.log(p) for p in NEW[:3]], [math.log(NEW[3]), NAN, NAN]])
OLD_LOGPROBS = torch.tensor([[math.log(p) for p in OLD[:3]], [math.log(OLD[3]), NAN, NAN]])
REPLIES = torch.tensor([[True, True, True], [True, False, False]])
COUNTS = {"replies": 2.0, "tokens": 4.0, "horizon": 8}
FACTORS = {  # of the tokens of each reply
    "token-mean": (1 / 4, 1 / 4),
    "seq-mean-token-mean": (1 / 6, 1 / 2),
    "seq-mean-token-sum": (1 / 2, 1 / 2),
    "seq-mean-token-sum-norm": (1 / 16, 1 / 16),
}


@pytest.mark.parametrize("average", get_args(Average))
def test_averages_weigh_tokens_as_their_names_say(average):
    got = averaging_weights(REPLIES, average, **COUNTS)
    torch.testing.assert_close(got, torch.tensor(FACTORS[average]).unsqueeze(1))


def test_an_average_without_its_constant_or_of_another_name_is_refused():
    with pytest.raises(ValueError, match="needs a horizon"):
        averaging_weights(REPLIES, "seq-mean-token-sum-norm", replies=2, tokens=4)
    with pytest.raises(ValueError, match="found average 'mean', needed one of token-mean"):
        averaging_weights(REPLIES, "mean", replies=2, tokens=4)


@pytest.mark.parametrize(
    ("high", "first", "slope"), [(0.28, -1.28, 0.0), (0.5, -1.375069, -1.375069)]
)
@pytest.mark.parametrize("average", get_args(Average))
def test_gspo_clips_the_mean_ratio_of_a_reply(average, high, first, slope):
    logprobs = LOGPROBS.clone().requires_grad_()
    loss, metrics = grpo_loss(
        logprobs, OLD_LOGPROBS, logprobs.detach(), torch.tensor([1.0, -2.0]), REPLIES, 0.2, 0.0,
        objective="gspo", clip_range_high=high, average=average, **COUNTS,
    )  # fmt: skip
    loss.backward()
    one, two = FACTORS[average]
    assert loss.item() == pytest.approx(3 * one * first + two * 2.05, abs=1e-5)
    want = torch.tensor([[one * slope] * 3, [two * 2.05, 0, 0]])
    torch.testing.assert_close(logprobs.grad, want, atol=1e-5, rtol=0)
    assert metrics["clip_fraction_high"].item() == (0.75 if slope == 0 else 0.0)


@pytest.mark.parametrize("objective", get_args(Objective))
@pytest.mark.parametrize("average", get_args(Average))
def test_before_the_first_update_every_objective_is_reinforce(objective, average):
    logprobs = LOGPROBS.clone().requires_grad_()
    advantages = torch.tensor([1.5, -2.0])
    loss, metrics = grpo_loss(
        logprobs, LOGPROBS, LOGPROBS, advantages, REPLIES, 0.2, 0.0, objective=objective,
        average=average, clip_range_high=0.3, **COUNTS,
    )  # fmt: skip
    loss.backward()
    weights = averaging_weights(REPLIES, average, **COUNTS)
    want = torch.where(REPLIES, -advantages.unsqueeze(1) * weights, 0.0)
    torch.testing.assert_close(logprobs.grad, want)
    assert metrics["clip_fraction"] == 0


@pytest.mark.parametrize("objective", get_args(Objective))
def test_a_ratio_that_overflows_leaves_no_nan(objective):
    logprobs = torch.tensor([[0.0, -1.0]], requires_grad=True)
    old = torch.tensor([[-200.0, -200.0]])
    advantages = torch.full((1, 2), 1.0)
    loss, _ = ppo_policy_loss(
        logprobs, old, advantages, torch.ones(1, 2, dtype=torch.bool), 0.2, objective=objective
    )
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logprobs.grad).all()


def test_unknown_objective_is_refused():
    with pytest.raises(ValueError, match="found objective 'ppo', needed clip"):
        ppo_policy_loss(log(NEW), log(OLD), ADVANTAGES, MASK, 0.2, objective="ppo")


def test_rloo_clips_each_side_of_the_ratio_of_a_reply_by_its_own_bound():
    new, old = torch.tensor([[-1.0], [-1.0]]), torch.tensor([[-1.3], [-3.0]])
    mask = torch.ones(2, 1, dtype=torch.bool)
    loss, metrics = rloo_loss(
        new, old, torch.tensor([1.0, -1.0]), mask, 0.1, replies=2.0, clip_range_high=0.25,
        dual_clip=5.0,
    )  # fmt: skip
    assert loss.item() == pytest.approx((-1.25 + 5.0) / 2)
    assert metrics["clip_fraction_high"] == metrics["dual_clip_fraction"] == 0.5


@pytest.mark.parametrize(
    ("kind", "corrected", "values", "slopes"),
    [
        # x = logprobs - reference: 0.2, -0.5, 0.2
        ("k2", False, [0.02, 0.125, 0.02], [0.2, -0.5, 0.2]),
        ("k3", False, [0.018731, 0.148721, 0.018731], [0.181269, -0.648721, 0.181269]),
        # times the ratios 1.105171, 0.740818 and 1.491825; the slope of r k is r (k + dk)
        ("k1", True, [0.221034, -0.370409, 0.298365], [1.326205, 0.370409, 1.790190]),
        ("k3", True, [0.020701, 0.110175, 0.027943], [0.221034, -0.370409, 0.298365]),
    ],
)
def test_kl_loss_matches_hand_values(kind, corrected, values, slopes):
    logprobs = torch.tensor([[-1.0, -2.0, -0.5, NAN]], requires_grad=True)
    old, ref = torch.tensor([[-1.1, -1.7, -0.9, NAN], [-1.2, -1.5, -0.7, NAN]]).split(1)
    got = kl_loss(logprobs, old, ref, MASK[:, 1:], kind, 0.5, corrected=corrected)
    got.backward()
    assert got.item() == pytest.approx(0.5 * sum(values), abs=2e-6)
    want = 0.5 * torch.tensor([[*slopes, 0.0]])
    torch.testing.assert_close(logprobs.grad, want, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("kind", "corrected", "updated", "same"),
    [
        ("k2", False, False, True),
        ("k1", True, False, True),
        ("k3", True, False, True),
        ("k1", True, True, True),
        ("k3", True, True, True),
        ("k1", False, False, False),
        ("k3", False, False, False),
        ("k2", True, False, False),
        ("k2", False, True, False),
    ],
)
def test_expected_gradient_of_the_kl_loss_is_that_of_the_kl_where_docs_say_so(
    kind, corrected, updated, same
):
    """Over a vocabulary of five tokens, where the expectation under the sampler can be summed."""
    generator = torch.Generator().manual_seed(3)
    weights, reference, earlier = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    weights.requires_grad_()
    logprobs, ref = weights.log_softmax(0), reference.log_softmax(0)
    old = earlier.log_softmax(0) if updated else logprobs.detach()
    [exact] = torch.autograd.grad((logprobs.exp() * (logprobs - ref)).sum(), weights)
    # Each token is the reply of a row; the sampler draws it with its old probability.
    expected = kl_loss(
        weights.log_softmax(0).unsqueeze(1), old.unsqueeze(1), ref.unsqueeze(1),
        torch.ones(5, 1, dtype=torch.bool), kind, old.exp().unsqueeze(1), corrected=corrected,
    )  # fmt: skip
    [got] = torch.autograd.grad(expected, weights)
    assert torch.allclose(got, exact, atol=1e-9) == same
    if kind == "k1" and not corrected:
        assert got.abs().max() < 1e-12, "nothing is held back"
