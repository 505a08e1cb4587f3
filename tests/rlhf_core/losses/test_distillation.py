"""Divergences of a distillation, against hand values and a plain implementation in Python."""

import math

import pytest
import torch

from rlhf_core.losses.distillation import divergence, divergence_with_gradient

# P = (1/2, 1/4, 1/4) and Q = (1/4, 1/4, 1/2): logits are their logarithms.
P = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64)
Q = torch.tensor([[0.25, 0.25, 0.5]], dtype=torch.float64)
LOG2 = math.log(2.0)
# beta 1/2: M = (3/8, 1/4, 3/8). KL(P||M) = 1/2 log(4/3) + 1/4 log(2/3), and KL(Q||M) is the same.
HALF = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3)


@pytest.mark.parametrize(
    ("beta", "by_hand"),
    [
        (0.0, 0.25 * LOG2),  # 1/2 log 2 - 1/4 log 2
        (1.0, 0.25 * LOG2),  # the same: Q is P turned around
        (0.5, HALF),
        # M = (5/16, 1/4, 7/16)
        (0.25, 0.25 * (0.5 * math.log(8 / 5) + 0.25 * math.log(4 / 7))
         + 0.75 * (0.25 * math.log(4 / 5) + 0.5 * math.log(8 / 7))),
    ],
)  # fmt: skip
def test_divergence_of_three_tokens_by_hand(beta, by_hand):
    found = divergence(Q.log(), P.log(), beta)
    assert float(found) == pytest.approx(by_hand, abs=1e-12)


def test_forward_and_reverse_are_not_swapped():
    """The teacher has a token that the student lacks: dear forward, cheap in reverse."""
    teacher = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    student = torch.tensor([[0.999, 0.001]], dtype=torch.float64).log()
    assert float(divergence(student, teacher, 0.0)) == pytest.approx(2.7606, abs=1e-3)
    assert float(divergence(student, teacher, 1.0)) == pytest.approx(0.6852, abs=1e-3)


def plain(student: list[float], teacher: list[float], beta: float) -> float:
    """The definition in GKD and in TRL's `generalized_jsd_loss`, one token at a time."""

    def softmax(logits: list[float]) -> list[float]:
        powers = [math.exp(x - max(logits)) for x in logits]
        return [x / sum(powers) for x in powers]

    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    q, p = softmax(student), softmax(teacher)
    if beta in (0.0, 1.0):
        return kl(p, q) if beta == 0.0 else kl(q, p)
    mixture = [beta * x + (1 - beta) * y for x, y in zip(p, q, strict=True)]
    return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_divergence_is_that_of_a_plain_implementation(beta):
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 6, 11, dtype=torch.float64, generator=generator)
    expected = [plain(s, t, beta) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)]
    assert divergence(student, teacher, beta).tolist() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_gradient_by_formula_is_that_of_autograd(beta):
    generator = torch.Generator().manual_seed(1)
    student, teacher = 3 * torch.randn(2, 6, 11, dtype=torch.float64, generator=generator)
    student.requires_grad_()
    value = divergence(student, teacher, beta)
    (expected,) = torch.autograd.grad(value.sum(), student)
    with torch.no_grad():
        found, grad = divergence_with_gradient(
            torch.log_softmax(student, dim=1), torch.log_softmax(teacher, dim=1), beta
        )
    torch.testing.assert_close(found, value.detach())
    torch.testing.assert_close(grad, expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_equal_distributions_have_no_divergence_and_no_gradient(beta):
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(2))
    student = (logits + 5.0).requires_grad_()  # a constant changes no distribution
    value = divergence(student, logits, beta).sum()
    value.backward()
    assert float(value.detach()) == pytest.approx(0.0, abs=1e-6)
    assert student.grad is not None and float(student.grad.abs().max()) < 1e-6
