"""Hand-computed values, and an independent sum for GAE."""

import math

import pytest
import torch
from torch import Tensor

from rlhf_core.losses import advantages as adv

LOGPROBS = torch.tensor([[-1.0, -2.0, -0.5]])
REF_LOGPROBS = torch.tensor([[-1.2, -1.5, -0.7]])
REWARDS = torch.tensor([[-0.02, 0.05, 1.98]])
VALUES = torch.tensor([[0.5, 0.4, 0.3]])
REAL = torch.ones(1, 3, dtype=torch.bool)
WHITE = [-1.057275, 0.126609, 0.930666]


def spread(x: Tensor, left: int, right: int, fill: float) -> Tensor:
    """x (1,3) between `left` and `right` columns of `fill`."""
    return torch.cat([torch.full((1, left), fill), x, torch.full((1, right), fill)], dim=1)


def spread_mask(left: int, right: int) -> Tensor:
    return spread(torch.ones(1, 3), left, right, 0.0).bool()


def test_token_rewards_adds_the_score_once_on_the_last_real_token() -> None:
    got = adv.token_rewards(torch.tensor([2.0]), LOGPROBS, REF_LOGPROBS, REAL, 0.1)
    torch.testing.assert_close(got, REWARDS)


@pytest.mark.parametrize(("left", "right"), [(0, 2), (2, 0), (1, 3)])
@pytest.mark.parametrize("fill", [math.nan, math.inf, 7.0])
def test_padding_on_either_side_changes_nothing(left: int, right: int, fill: float) -> None:
    mask = spread_mask(left, right)
    real = slice(left, left + 3)
    got = adv.token_rewards(
        torch.tensor([2.0]),
        spread(LOGPROBS, left, right, fill),
        spread(REF_LOGPROBS, left, right, -fill),
        mask,
        0.1,
    )
    torch.testing.assert_close(got[:, real], REWARDS)
    assert not got[~mask].any()

    advantages, returns = adv.gae(
        spread(REWARDS, left, right, fill), spread(VALUES, left, right, fill), mask, 0.9, 0.8
    )
    want = torch.tensor([[0.653312, 1.1296, 1.68]])
    torch.testing.assert_close(advantages[:, real], want, atol=1e-6, rtol=0)
    torch.testing.assert_close(returns[:, real], want + VALUES, atol=1e-6, rtol=0)
    assert not advantages[~mask].any() and not returns[~mask].any()

    x = torch.tensor([[1.3487, 1.546, 1.68]])
    got = adv.masked_whiten(spread(x, left, right, fill), mask)
    torch.testing.assert_close(got[:, real], torch.tensor([WHITE]), atol=1e-5, rtol=0)
    assert not got[~mask].any()


def test_token_rewards_refuses_a_row_without_tokens() -> None:
    mask = torch.tensor([[True, True], [False, False]])
    with pytest.raises(ValueError, match="row 1"):
        adv.token_rewards(torch.ones(2), torch.zeros(2, 2), torch.zeros(2, 2), mask, 0.1)
    with pytest.raises(ValueError, match="scores"):
        adv.token_rewards(torch.ones(2, 1), torch.zeros(2, 2), torch.zeros(2, 2), mask, 0.1)


def test_gae_matches_hand_values() -> None:
    advantages, returns = adv.gae(REWARDS, VALUES, REAL, 1.0, 0.95)
    torch.testing.assert_close(advantages, torch.tensor([[1.3487, 1.546, 1.68]]))
    torch.testing.assert_close(returns, torch.tensor([[1.8487, 1.946, 1.98]]))
    advantages, _ = adv.gae(REWARDS, VALUES, REAL, 0.9, 0.8)
    torch.testing.assert_close(
        advantages, torch.tensor([[0.653312, 1.1296, 1.68]]), atol=1e-6, rtol=0
    )


def test_gae_equals_the_explicit_double_sum_on_ragged_rows() -> None:
    generator = torch.Generator().manual_seed(3)
    rewards = torch.randn(5, 9, generator=generator, dtype=torch.float64)
    values = torch.randn(5, 9, generator=generator, dtype=torch.float64)
    # left padding, right padding, and a hole in the middle
    mask = torch.rand(5, 9, generator=generator) < 0.6
    gamma, lam = 0.93, 0.87
    advantages, _ = adv.gae(rewards, values, mask, gamma, lam)
    for row in range(5):
        r, v = rewards[row, mask[row]].tolist(), values[row, mask[row]].tolist()
        after = [*v[1:], 0.0]
        delta = [r[t] + gamma * after[t] - v[t] for t in range(len(r))]
        want = [
            sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(r)))
            for t in range(len(r))
        ]
        assert advantages[row, mask[row]].tolist() == pytest.approx(want)


def test_gae_with_lambda_one_is_return_minus_value() -> None:
    advantages, returns = adv.gae(REWARDS, VALUES, REAL, 1.0, 1.0)
    torch.testing.assert_close(returns, REWARDS.flip(1).cumsum(1).flip(1))
    torch.testing.assert_close(advantages, returns - VALUES)


def test_masked_whiten_matches_hand_values() -> None:
    x = torch.tensor([[1.3487, 1.546, 1.68]])
    torch.testing.assert_close(adv.masked_whiten(x, REAL), torch.tensor([WHITE]), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        adv.masked_whiten(x, REAL, shift_mean=False),
        torch.tensor([[0.467625, 1.651509, 2.455566]]),
        atol=1e-5,
        rtol=0,
    )


def test_masked_whiten_over_ranks_equals_the_whole_batch() -> None:
    generator = torch.Generator().manual_seed(4)
    x = 1000 + torch.randn(6, 5, generator=generator)
    mask = torch.arange(5) < torch.tensor([1, 5, 2, 3, 5, 4]).unsqueeze(1)
    whole = adv.masked_whiten(x, mask)
    ranks = [(x[i::3], mask[i::3]) for i in range(3)]
    moments = torch.stack([adv.masked_moments(*rank) for rank in ranks]).sum(0)  # the all-reduce
    stats = adv.moments_to_stats(moments)
    for i, rank in enumerate(ranks):
        torch.testing.assert_close(adv.masked_whiten(*rank, stats=stats), whole[i::3])
    count, total, total_sq = adv.masked_moments(x, mask)
    assert count == 20
    torch.testing.assert_close(total, x[mask].double().sum())
    torch.testing.assert_close(total_sq, x[mask].double().square().sum())
    mean, var = stats
    torch.testing.assert_close(mean, x[mask].double().mean())
    torch.testing.assert_close(var, x[mask].double().var())


def test_masked_whiten_needs_two_tokens() -> None:
    with pytest.raises(ValueError, match="found 1"):
        adv.masked_whiten(torch.ones(1, 2), torch.tensor([[True, False]]))


def test_explained_variance_of_perfect_mean_and_bad_critics() -> None:
    returns = torch.tensor([[1.0, 2.0, 4.0, math.nan]])
    mask = torch.tensor([[True, True, True, False]])
    assert adv.explained_variance(returns, returns, mask) == 1
    constant = torch.full((1, 4), 9.0)
    assert adv.explained_variance(constant, returns, mask).item() == pytest.approx(0, abs=1e-9)
    assert adv.explained_variance(-returns, returns, mask).item() == pytest.approx(-3)
    assert adv.explained_variance(returns, torch.ones(1, 4), mask).isnan()


@pytest.mark.parametrize(
    ("kind", "want"),
    [
        ("grpo", [-0.707057, 0.0, 1.414114, -0.707057]),
        ("rloo", [-1.333333, 0.0, 2.666667, -1.333333]),
    ],
)
def test_group_advantages_match_hand_values(kind: str, want: list[float]) -> None:
    scores = torch.tensor([1.0, 2.0, 4.0, 1.0])
    got = adv.group_advantages(scores, 4, kind)
    torch.testing.assert_close(got, torch.tensor(want), atol=1e-6, rtol=0)
    # a second group with other scores changes nothing in the first
    both = adv.group_advantages(torch.cat([scores, 10 * scores.flip(0)]), 4, kind)
    torch.testing.assert_close(both[:4], got)


def test_group_advantages_rloo_is_score_minus_mean_of_the_others() -> None:
    scores = torch.tensor([0.3, -2.0, 5.0])
    got = adv.group_advantages(scores, 3, "rloo").tolist()
    assert got == pytest.approx([0.3 - 1.5, -2.0 - 2.65, 5.0 + 0.85])


@pytest.mark.parametrize("score", [3.0, 0.7, 10.1, -100.1])
def test_group_advantages_of_equal_scores_are_zero(score: float) -> None:
    for kind in ("grpo", "dr_grpo", "rloo"):
        # 0.7 has no exact mean in fp32: 7 of them over 7 are another number.
        assert not adv.group_advantages(torch.full((14,), score), 7, kind).any()


def test_group_advantages_refuse_bad_groups() -> None:
    with pytest.raises(ValueError, match="multiple of group_size 4"):
        adv.group_advantages(torch.zeros(6), 4)
    with pytest.raises(ValueError, match="at least 2"):
        adv.group_advantages(torch.zeros(6), 1)
    with pytest.raises(ValueError, match="rloo"):
        adv.group_advantages(torch.zeros(4), 4, "mean")  # type: ignore[arg-type]
