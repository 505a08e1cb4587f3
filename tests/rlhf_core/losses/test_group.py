"""Hand-computed values of GRPO's, RLOO's and REINFORCE++'s losses and advantages."""

from typing import get_args

import pytest
import torch

from rlhf_core.losses import advantages as adv
from rlhf_core.losses.group import grpo_loss, rloo_loss
from rlhf_core.losses.reductions import Average

NAN = float("nan")
# A reply of three tokens and one of one.
MASK = torch.tensor([[True, True, True], [True, False, False]])
LOGPROBS = torch.tensor([[-1.0, -2.0, -0.5], [-0.3, NAN, NAN]])
OLD = torch.tensor([[-1.1, -1.7, -0.9], [-0.3, NAN, NAN]])
REF = torch.tensor([[-1.2, -1.5, -0.7], [-0.5, NAN, NAN]])
ADVANTAGES = torch.tensor([1.0, -2.0])
COUNTS = {"replies": 2.0, "tokens": 4.0, "horizon": 5}


@pytest.mark.parametrize(
    ("average", "policy", "kl"),
    [
        (
            "seq-mean-token-mean",
            (-(1.105171 + 0.740818 + 1.2) / 3 + 2.0) / 2,
            (0.186183 / 3 + 0.018731) / 2,
        ),
        ("token-mean", (-(1.105171 + 0.740818 + 1.2) + 2.0) / 4, (0.186183 + 0.018731) / 4),
    ],
)
def test_grpo_loss_matches_hand_values(average, policy, kl):
    loss, metrics = grpo_loss(
        LOGPROBS, OLD, REF, ADVANTAGES, MASK, 0.2, 0.1, average=average, **COUNTS
    )
    assert loss.item() == pytest.approx(policy + 0.1 * kl, abs=1e-6)
    assert metrics["kl_loss"].item() == pytest.approx(kl, abs=1e-6)
    assert metrics["clip_fraction"].item() == pytest.approx(0.25)


def test_grpo_gradient_is_that_of_the_ratio_and_of_k3():
    logprobs = LOGPROBS.clone().requires_grad_()
    loss, _ = grpo_loss(logprobs, OLD, REF, ADVANTAGES, MASK, 0.2, 0.1, **COUNTS)
    loss.backward()
    # d k3 = 1 - exp(ref - logprob); the third token's ratio of 1.49 is clipped.
    want = [
        [(-1.105171 + 0.1 * 0.181269) / 6, (-0.740818 - 0.1 * 0.648721) / 6, 0.1 * 0.181269 / 6],
        [(2.0 + 0.1 * 0.181269) / 2, 0.0, 0.0],
    ]
    torch.testing.assert_close(logprobs.grad, torch.tensor(want), atol=1e-6, rtol=0)


@pytest.mark.parametrize("average", get_args(Average))
def test_grpo_loss_of_micro_batches_sums_to_the_whole(average):
    whole, _ = grpo_loss(LOGPROBS, OLD, REF, ADVANTAGES, MASK, 0.2, 0.1, average=average, **COUNTS)
    parts = [
        grpo_loss(
            LOGPROBS[i], OLD[i], REF[i], ADVANTAGES[i], MASK[i], 0.2, 0.1,
            average=average, **COUNTS,
        )[0]
        for i in (slice(0, 1), slice(1, 2))
    ]  # fmt: skip
    torch.testing.assert_close(sum(parts), whole)


def test_rloo_loss_clips_the_ratio_of_the_whole_reply():
    loss, metrics = rloo_loss(LOGPROBS, OLD, ADVANTAGES, MASK, 0.2, replies=2.0)
    # exp(0.2) = 1.2214 is above 1.2, though two tokens' own ratios are farther out.
    assert loss.item() == pytest.approx((-1.2 + 2.0) / 2)
    assert metrics["clip_fraction"].item() == 0.5


def test_rloo_gradient_on_policy_is_reinforce():
    logprobs = LOGPROBS.clone().requires_grad_()
    rloo_loss(logprobs, LOGPROBS, ADVANTAGES, MASK, 0.2, replies=2.0)[0].backward()
    want = torch.tensor([[-0.5, -0.5, -0.5], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(logprobs.grad, want)


def test_dr_grpo_advantages_are_not_scaled():
    got = adv.group_advantages(torch.tensor([1.0, 2.0, 4.0, 1.0]), 4, "dr_grpo")
    assert got.tolist() == [-1.0, 0.0, 2.0, -1.0]


def test_returns_to_go_match_hand_values():
    rewards = torch.tensor([[-0.02, 0.05, 1.98, NAN]])
    mask = torch.tensor([[True, True, True, False]])
    for gamma, want in ((1.0, [2.01, 2.03, 1.98, 0.0]), (0.9, [1.6288, 1.832, 1.98, 0.0])):
        got = adv.returns_to_go(rewards, mask, gamma)
        torch.testing.assert_close(got, torch.tensor([want]))
    white = adv.masked_whiten(adv.returns_to_go(rewards, mask), mask)
    want = torch.tensor([[0.13245, 0.92717, -1.05962, 0.0]])
    torch.testing.assert_close(white, want, atol=1e-4, rtol=0)
