"""Hand-computed values, and properties that a flipped sign or a lost mask would break."""

import math

import pytest
import torch
from torch import Tensor

from rlhf_core.losses.ppo import kl_estimate, ppo_policy_loss, ppo_value_loss
from rlhf_core.losses.preference import dpo_loss, ipo_loss, kto_loss, orpo_odds_loss, simpo_loss
from rlhf_core.losses.reductions import Metrics, sequence_logps
from rlhf_core.losses.supervised import pairwise_loss, sft_loss

LOGPROBS = torch.tensor([[-1.0, -2.0, -0.5]])
REF_LOGPROBS = torch.tensor([[-1.2, -1.5, -0.7]])
OLD_LOGPROBS = torch.tensor([[-1.1, -1.7, -0.9]])
ADVANTAGES = torch.tensor([[1.0, -0.5, 2.0]])
VALUES = torch.tensor([[0.8, 0.1, 0.35]])
OLD_VALUES = torch.tensor([[0.5, 0.4, 0.3]])
RETURNS = torch.tensor([[1.0, 0.9, 0.2]])
REAL = torch.ones(1, 3, dtype=torch.bool)
GARBAGE = [math.nan, math.inf, -math.inf, 1e30]


def padded(x: Tensor, left: float, right: float) -> Tensor:
    """x (B,3) with one column of garbage on either side, (B,5)."""
    column = torch.ones(x.shape[0], 1, dtype=x.dtype)
    return torch.cat([column * left, x, column * right], dim=1)


def padded_mask(x: Tensor) -> Tensor:
    column = torch.zeros(x.shape[0], 1, dtype=torch.bool)
    return torch.cat([column, torch.ones(x.shape, dtype=torch.bool), column], dim=1)


# ------------------------------------------------------------------------------------ pairwise
@pytest.mark.parametrize("kind", ["log_sig", "log_exp"])
def test_pairwise_loss_matches_hand_value(kind: str) -> None:
    loss, metrics = pairwise_loss(torch.tensor([1.2, 0.3]), torch.tensor([0.7, 0.9]), kind)
    assert loss.item() == pytest.approx(0.755782, abs=1e-6)
    assert metrics["accuracy"].item() == 0.5
    assert metrics["margin"].item() == pytest.approx(-0.05)


def test_pairwise_loss_with_margins_and_centring_matches_hand_values() -> None:
    chosen, rejected = torch.tensor([1.2, 0.3]), torch.tensor([0.7, 0.9])
    margins = torch.tensor([1.0, 0.5])  # softplus(1.0 - 0.5), softplus(0.5 + 0.6)
    loss, metrics = pairwise_loss(chosen, rejected, margins=margins)
    assert loss.item() == pytest.approx((0.974077 + 1.387336) / 2, abs=1e-6)
    assert metrics["margin"].item() == pytest.approx(-0.05), "of the scores, whatever was asked for"
    centred, _ = pairwise_loss(chosen, rejected, center_coef=0.1)
    assert centred.item() == pytest.approx(0.755782 + 0.1 * (1.9**2 + 1.2**2) / 2, abs=1e-6)
    half, _ = pairwise_loss(chosen, rejected, margins=margins, center_coef=0.1, denominator=4.0)
    assert half.item() == pytest.approx((1.180707 + 0.2525) / 2, abs=1e-6), "the global batch"
    with pytest.raises(ValueError, match="one shape"):
        pairwise_loss(chosen, rejected, margins=torch.zeros(2, 1))


def test_pairwise_loss_counts_a_tie_as_half() -> None:
    scores = torch.tensor([1.0, 2.0])
    _, metrics = pairwise_loss(scores, torch.tensor([1.0, 0.0]))
    assert metrics["accuracy"].item() == 0.75


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 100.0, 60000.0])
def test_pairwise_loss_is_finite_at_any_difference(dtype: torch.dtype, size: float) -> None:
    chosen = torch.tensor([-size, size], dtype=dtype, requires_grad=True)
    loss, _ = pairwise_loss(chosen, torch.tensor([size, -size], dtype=dtype))
    loss.backward()
    assert torch.isfinite(loss)
    assert chosen.grad is not None and torch.isfinite(chosen.grad).all()
    # the mean over two pairs of softplus(2 size) and softplus(-2 size)
    rounded = float(torch.tensor(size, dtype=dtype))
    want = (2 * rounded + 2 * math.log1p(math.exp(-2 * rounded))) / 2
    assert loss.item() == pytest.approx(want, rel=1e-5)


def test_pairwise_loss_refuses_unknown_kind_and_broadcasts() -> None:
    with pytest.raises(ValueError, match="log_sig"):
        pairwise_loss(torch.zeros(2), torch.zeros(2), "hinge")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one shape"):
        pairwise_loss(torch.zeros(2, 1), torch.zeros(2))


# ------------------------------------------------------------------------------------------ KL
@pytest.mark.parametrize(
    ("kind", "want"),
    [
        ("k1", [0.2, -0.5, 0.2]),
        ("k2", [0.02, 0.125, 0.02]),
        ("k3", [0.018731, 0.148721, 0.018731]),
    ],
)
def test_kl_estimate_matches_hand_values(kind: str, want: list[float]) -> None:
    got = kl_estimate(LOGPROBS, REF_LOGPROBS, kind)
    torch.testing.assert_close(got, torch.tensor([want]), atol=1e-6, rtol=0)


def test_kl_estimates_agree_with_the_exact_kl_under_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(8, generator=generator).log_softmax(0)
    reference = (policy + 0.3 * torch.randn(8, generator=generator)).log_softmax(0)
    exact = (policy.exp() * (policy - reference)).sum()
    for kind in ("k1", "k3"):  # the two unbiased ones, by their exact expectation
        values = kl_estimate(policy.unsqueeze(0), reference.unsqueeze(0), kind)[0]
        torch.testing.assert_close((policy.exp() * values).sum(), exact)


# ---------------------------------------------------------------------------------- PPO policy
def test_ppo_policy_loss_matches_hand_value() -> None:
    loss, metrics = ppo_policy_loss(LOGPROBS, OLD_LOGPROBS, ADVANTAGES, REAL, 0.2)
    assert loss.item() == pytest.approx(-1.035057, abs=1e-6)
    assert metrics["clip_fraction"].item() == pytest.approx(2 / 3)
    ratios = [math.exp(0.1), math.exp(-0.3), math.exp(0.4)]
    assert metrics["ratio_mean"].item() == pytest.approx(sum(ratios) / 3)
    assert metrics["ratio_max"].item() == pytest.approx(ratios[2])
    k3 = sum(r - 1 - math.log(r) for r in ratios) / 3
    assert metrics["approx_kl"].item() == pytest.approx(k3, abs=1e-6)


def test_ppo_policy_loss_sends_a_gradient_only_to_unclipped_tokens() -> None:
    logprobs = LOGPROBS.clone().requires_grad_()
    loss, _ = ppo_policy_loss(logprobs, OLD_LOGPROBS, ADVANTAGES, REAL, 0.2)
    loss.backward()
    want = torch.tensor([[-math.exp(0.1) / 3, 0.0, 0.0]])
    torch.testing.assert_close(logprobs.grad, want)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_ppo_policy_loss_keeps_the_pessimistic_branch(sign: float) -> None:
    """The four corners of figure 1 of the paper, against max(-rA, -clip(r)A) spelled out."""
    log_ratio = torch.tensor([[math.log(0.5), math.log(1.5)]])
    advantages = torch.full((1, 2), sign)
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss, _ = ppo_policy_loss(log_ratio, torch.zeros(1, 2), advantages, mask, 0.2)
    want = sum(max(-r * sign, -min(max(r, 0.8), 1.2) * sign) for r in (0.5, 1.5)) / 2
    assert loss.item() == pytest.approx(want)


def test_ppo_policy_loss_survives_an_overflowing_ratio_that_is_clipped() -> None:
    logprobs = torch.tensor([[0.0, -1.0]], requires_grad=True)
    old = torch.tensor([[-200.0, -1.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss, metrics = ppo_policy_loss(logprobs, old, torch.ones(1, 2), mask, 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(-1.1)
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.0, -0.5]]))
    assert math.isinf(metrics["ratio_max"].item())  # reported, not hidden


@pytest.mark.parametrize("left", GARBAGE)
@pytest.mark.parametrize("right", GARBAGE)
def test_ppo_losses_ignore_padding_whatever_it_holds(left: float, right: float) -> None:
    mask = padded_mask(LOGPROBS)
    logprobs = padded(LOGPROBS, left, right).requires_grad_()
    loss, metrics = ppo_policy_loss(
        logprobs, padded(OLD_LOGPROBS, right, left), padded(ADVANTAGES, left, left), mask, 0.2
    )
    loss.backward()
    assert loss.item() == pytest.approx(-1.035057, abs=1e-6)
    assert metrics["clip_fraction"].item() == pytest.approx(2 / 3)
    assert all(torch.isfinite(v) for v in metrics.values())
    assert logprobs.grad is not None
    torch.testing.assert_close(
        logprobs.grad, torch.tensor([[0.0, -math.exp(0.1) / 3, 0.0, 0.0, 0.0]])
    )

    values = padded(VALUES, left, right).requires_grad_()
    loss, metrics = ppo_value_loss(
        values, padded(OLD_VALUES, right, left), padded(RETURNS, left, left), mask, 0.2
    )
    loss.backward()
    assert loss.item() == pytest.approx(0.125417, abs=1e-6)
    assert all(torch.isfinite(v) for v in metrics.values())
    assert values.grad is not None and torch.isfinite(values.grad).all()
    assert values.grad[0, 0] == 0 and values.grad[0, 4] == 0


# ----------------------------------------------------------------------------------- PPO value
def test_ppo_value_loss_matches_hand_value() -> None:
    loss, metrics = ppo_value_loss(VALUES, OLD_VALUES, RETURNS, REAL, 0.2)
    assert loss.item() == pytest.approx(0.125417, abs=1e-6)
    # token 1: clipped to 0.7, error 0.09 > 0.04; token 2: clipped to 0.2, error 0.49 < 0.64
    assert metrics["clip_fraction"].item() == pytest.approx(1 / 3)
    assert metrics["squared_error"].item() == pytest.approx((0.04 + 0.64 + 0.0225) / 3)
    assert metrics["value_mean"].item() == pytest.approx(1.25 / 3)
    assert metrics["return_mean"].item() == pytest.approx(0.7)


def test_ppo_value_loss_without_a_clip_is_half_the_squared_error() -> None:
    loss, metrics = ppo_value_loss(VALUES, OLD_VALUES, RETURNS, REAL, None)
    assert loss.item() == pytest.approx((0.04 + 0.64 + 0.0225) / 6)
    assert metrics["clip_fraction"].item() == 0


# ------------------------------------------------------------------------------ preference
def test_dpo_loss_matches_hand_value() -> None:
    args = [torch.tensor([x]) for x in (-12.0, -15.0, -13.0, -14.5)]
    loss, metrics = dpo_loss(*args, beta=0.1)
    assert loss.item() == pytest.approx(0.620957, abs=1e-6)
    assert metrics["margin"].item() == pytest.approx(0.15)
    assert metrics["accuracy"].item() == 1.0
    assert metrics["chosen_reward"].item() == pytest.approx(0.1)
    assert metrics["rejected_reward"].item() == pytest.approx(-0.05)


def test_dpo_label_smoothing_matches_hand_value() -> None:
    args = [torch.tensor([x]) for x in (-12.0, -15.0, -13.0, -14.5)]
    loss, metrics = dpo_loss(*args, beta=0.1, label_smoothing=0.2)
    # the margin is 0.15: 0.8 softplus(-0.15) + 0.2 softplus(0.15) = 0.620957 + 0.2 * 0.15
    assert loss.item() == pytest.approx(0.650957, abs=1e-6)
    assert metrics["margin"].item() == pytest.approx(0.15)


def test_dpo_label_smoothing_stops_at_the_margin_of_its_share() -> None:
    """The smoothed loss is least where sigmoid(margin) = 1 - e."""
    best = math.log(0.8 / 0.2)
    for margin, sign in ((best - 0.1, -1), (best + 0.1, 1)):
        chosen = torch.tensor([margin / 0.1], requires_grad=True)
        loss, _ = dpo_loss(chosen, *torch.zeros(3, 1), beta=0.1, label_smoothing=0.2)
        loss.backward()
        assert chosen.grad is not None and chosen.grad.item() * sign > 0


def test_ipo_loss_matches_hand_value() -> None:
    args = [torch.tensor([x]) for x in (-12.0, -15.0, -13.0, -14.5)]
    loss, metrics = ipo_loss(*args, beta=0.1)
    # h = (-12 + 13) - (-15 + 14.5) = 1.5 nats, aimed at 1 / 0.2 = 5
    assert loss.item() == pytest.approx(3.5**2)
    assert metrics["margin"].item() == pytest.approx(0.15)
    assert metrics["chosen_reward"].item() == pytest.approx(0.1)


def test_ipo_loss_aims_at_a_margin_and_not_beyond() -> None:
    zero = torch.zeros(1)
    for chosen_logp, sign in ((4.9, -1), (5.1, 1)):
        chosen = torch.tensor([chosen_logp], requires_grad=True)
        ipo_loss(chosen, zero, zero, zero, beta=0.1)[0].backward()
        assert chosen.grad is not None and chosen.grad.item() * sign > 0


def test_simpo_loss_matches_hand_value() -> None:
    loss, metrics = simpo_loss(torch.tensor([-1.2]), torch.tensor([-1.5]), 2.0, 1.0)
    assert loss.item() == pytest.approx(0.913015, abs=1e-6)
    assert metrics["margin"].item() == pytest.approx(0.6)
    assert metrics["chosen_reward"].item() == pytest.approx(-2.4)
    assert metrics["rejected_reward"].item() == pytest.approx(-3.0)


def test_orpo_odds_loss_matches_hand_value() -> None:
    loss, metrics = orpo_odds_loss(torch.tensor([-1.2]), torch.tensor([-1.5]))
    assert loss.item() == pytest.approx(0.510652, abs=1e-6)
    assert metrics["margin"].item() == pytest.approx(0.4059, abs=1e-4)


@pytest.mark.parametrize("logp", [0.0, -1e-8, -0.3, -0.7, -40.0])
def test_orpo_odds_loss_is_finite_and_exact_near_certainty(logp: float) -> None:
    chosen = torch.tensor([logp], requires_grad=True)
    rejected = torch.tensor([-1.0], requires_grad=True)
    loss, metrics = orpo_odds_loss(chosen, rejected)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(chosen.grad).all() and torch.isfinite(rejected.grad).all()
    p = min(logp, -1e-6)
    want = (p - math.log(-math.expm1(p))) - (-1.0 - math.log(-math.expm1(-1.0)))
    assert metrics["margin"].item() == pytest.approx(want, rel=1e-4)


def test_kto_loss_matches_hand_value() -> None:
    loss, metrics = kto_loss(
        torch.tensor([-10.0, -20.0]),
        torch.tensor([-12.0, -19.0]),
        torch.tensor([True, False]),
        kl=0.5,
        beta=0.1,
        desirable_weight=1.0,
        undesirable_weight=2.0,
    )
    # desirable: 1 - sigmoid(0.1 (2 - 0.5)); undesirable: 2 (1 - sigmoid(0.1 (0.5 + 1)))
    miss = 1 - 1 / (1 + math.exp(-0.15))
    assert loss.item() == pytest.approx((miss + 2 * miss) / 2, abs=1e-6)
    assert metrics["margin"].item() == pytest.approx(0.15)
    assert metrics["accuracy"].item() == 1.0


def test_kto_loss_gradient_raises_desirable_and_lowers_undesirable_and_skips_kl() -> None:
    logps = torch.tensor([-10.0, -10.0], requires_grad=True)
    kl = torch.tensor(0.5, requires_grad=True)
    loss, _ = kto_loss(logps, torch.full((2,), -10.0), torch.tensor([True, False]), kl, 0.1)
    loss.backward()
    assert logps.grad is not None and logps.grad[0] < 0 < logps.grad[1]
    assert kl.grad is None


def test_kto_loss_counts_a_negative_kl_as_zero() -> None:
    args = (torch.tensor([-1.0]), torch.tensor([-2.0]), torch.tensor([True]))
    assert kto_loss(*args, -3.0, 0.1)[0] == kto_loss(*args, 0.0, 0.1)[0]


# ----------------------------------------------------------------------------- the denominator
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_micro_batches_sum_to_the_global_mean(parts: int) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(8, 6, generator=generator) for _ in range(4)]
    mask = torch.arange(6) < torch.tensor([1, 6, 2, 3, 6, 1, 5, 4]).unsqueeze(1)
    count = mask.sum()

    def policy(*a: Tensor, **k: Tensor | None) -> tuple[Tensor, Metrics]:
        return ppo_policy_loss(a[0], a[1], a[2], a[3], 0.2, **k)

    def value(*a: Tensor, **k: Tensor | None) -> tuple[Tensor, Metrics]:
        return ppo_value_loss(a[0], a[1], a[2], a[3], 0.2, **k)

    def sft(*a: Tensor, **k: Tensor | None) -> tuple[Tensor, Metrics]:
        return sft_loss(a[0], a[3], **k)

    for function in (policy, value, sft):
        whole, whole_metrics = function(*rows[:3], mask)
        total = torch.zeros(())
        summed: dict[str, Tensor] = {}
        for i in range(parts):
            piece = [x[i::parts] for x in (*rows[:3], mask)]
            loss, metrics = function(*piece, denominator=count)
            total += loss
            for name, v in metrics.items():
                old = summed.get(name, torch.zeros(()))
                summed[name] = torch.maximum(old, v) if name.endswith("_max") else old + v
        torch.testing.assert_close(total, whole)
        for name, v in summed.items():
            torch.testing.assert_close(v, whole_metrics[name])


def test_pair_losses_sum_to_the_global_mean() -> None:
    a, b, c, d = torch.randn(4, 6, generator=torch.Generator().manual_seed(2)) - 3
    label = torch.tensor([True, False, True, True, False, False])
    for whole, parts in [
        (
            pairwise_loss(a, b),
            [
                pairwise_loss(x, y, denominator=6)
                for x, y in zip(a.split(2), b.split(2), strict=True)
            ],
        ),
        (
            dpo_loss(a, b, c, d, 0.1),
            [
                dpo_loss(*x, 0.1, denominator=6)
                for x in zip(a.split(2), b.split(2), c.split(2), d.split(2), strict=True)
            ],
        ),
        (
            dpo_loss(a, b, c, d, 0.1, 0.3),
            [
                dpo_loss(*x, 0.1, 0.3, denominator=6)
                for x in zip(a.split(2), b.split(2), c.split(2), d.split(2), strict=True)
            ],
        ),
        (
            ipo_loss(a, b, c, d, 0.1),
            [
                ipo_loss(*x, 0.1, denominator=6)
                for x in zip(a.split(2), b.split(2), c.split(2), d.split(2), strict=True)
            ],
        ),
        (
            simpo_loss(a, b, 2, 1),
            [
                simpo_loss(x, y, 2, 1, denominator=6)
                for x, y in zip(a.split(2), b.split(2), strict=True)
            ],
        ),
        (
            orpo_odds_loss(a, b),
            [
                orpo_odds_loss(x, y, denominator=6)
                for x, y in zip(a.split(2), b.split(2), strict=True)
            ],
        ),
        (
            kto_loss(a, b, label, 0.1, 0.1),
            [
                kto_loss(x, y, z, 0.1, 0.1, denominator=6)
                for x, y, z in zip(a.split(2), b.split(2), label.split(2), strict=True)
            ],
        ),
    ]:
        torch.testing.assert_close(sum(p[0] for p in parts), whole[0])
        for name in whole[1]:
            torch.testing.assert_close(sum(p[1][name] for p in parts), whole[1][name])


def test_an_empty_micro_batch_adds_zero_only_under_a_denominator() -> None:
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    logprobs = LOGPROBS.clone().requires_grad_()
    loss, _ = ppo_policy_loss(logprobs, OLD_LOGPROBS, ADVANTAGES, nothing, 0.2, denominator=7)
    loss.backward()
    assert loss.item() == 0 and logprobs.grad is not None and not logprobs.grad.any()
    with pytest.raises(ValueError, match="no real token"):
        ppo_policy_loss(LOGPROBS, OLD_LOGPROBS, ADVANTAGES, nothing, 0.2)


# ------------------------------------------------------------------------------------- helpers
def test_sequence_logps_sums_and_means_real_tokens_only() -> None:
    x = torch.tensor([[-1.0, -2.0, math.nan], [math.inf, -3.0, -5.0]])
    mask = torch.tensor([[True, True, False], [False, True, True]])
    assert sequence_logps(x, mask).tolist() == [-3.0, -8.0]
    assert sequence_logps(x, mask, mean=True).tolist() == [-1.5, -4.0]
    with pytest.raises(ValueError, match="row 1"):
        sequence_logps(x, mask & torch.tensor([[True], [False]]), mean=True)


def test_sft_loss_is_the_mean_negative_logprob() -> None:
    loss, _ = sft_loss(padded(LOGPROBS, math.nan, 0.0), padded_mask(LOGPROBS))
    assert loss.item() == pytest.approx(3.5 / 3)


def test_losses_refuse_a_mask_that_is_not_bool() -> None:
    with pytest.raises(ValueError, match="bool"):
        ppo_policy_loss(LOGPROBS, OLD_LOGPROBS, ADVANTAGES, REAL.long(), 0.2)


def test_metrics_carry_no_gradient() -> None:
    logprobs = LOGPROBS.clone().requires_grad_()
    _, metrics = ppo_policy_loss(logprobs, OLD_LOGPROBS, ADVANTAGES, REAL, 0.2)
    assert not any(v.requires_grad for v in metrics.values())
    scores = torch.zeros(2, requires_grad=True)
    _, metrics = dpo_loss(scores, scores, scores, scores, 0.1)
    assert not any(v.requires_grad for v in metrics.values())
