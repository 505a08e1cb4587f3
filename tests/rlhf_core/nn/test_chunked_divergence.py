"""The chunked divergence against the plain one on whole logits."""

import pytest
import torch
from torch import nn

from rlhf_core.losses.distillation import divergence
from rlhf_core.nn.chunked_divergence import divergence_sum
from rlhf_core.nn.vocabulary_head import Head

N, D, V, MORE = 13, 5, 17, 20  # the teacher's embedding is padded to more rows


def made(*, bias=False, scale=1.0, softcap=None):
    torch.manual_seed(0)
    layer = nn.Linear(D, V, bias=bias).double()
    hidden = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    teacher = 2 * torch.randn(N, MORE, dtype=torch.float64)
    return Head(layer, scale, softcap), hidden, teacher


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "options", [{}, {"bias": True}, {"scale": 0.5, "softcap": 3.0, "bias": True}]
)
def test_value_and_gradients_are_those_of_whole_logits(beta, options):
    head, hidden, teacher = made(**options)
    wanted = [hidden, *head.layer.parameters()]
    plain = head.logits(hidden) / 0.7
    expected = divergence(plain, teacher[:, :V] / 0.7, beta).sum() / 3
    grads = torch.autograd.grad(expected, wanted)
    found = divergence_sum(hidden, head, lambda rows: teacher[rows], beta, 0.7, V, chunk=4) / 3
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found, wanted), grads, strict=True):
        torch.testing.assert_close(one, other)


def test_tokens_that_the_teacher_lacks_do_not_count():
    head, hidden, teacher = made(bias=True)
    known = 9
    wanted = [hidden, *head.layer.parameters()]
    plain = head.logits(hidden)[:, :known]
    expected = divergence(plain, teacher[:, :known], 0.5).sum()
    found = divergence_sum(hidden, head, lambda rows: teacher[rows], 0.5, 1.0, known, chunk=6)
    torch.testing.assert_close(found, expected)
    pairs = zip(
        torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted), strict=True
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other)


def test_frozen_head_and_empty_micro_batch():
    head, hidden, teacher = made()
    head.layer.requires_grad_(False)
    found = divergence_sum(hidden, head, lambda rows: teacher[rows], 0.5, 1.0, V)
    found.backward()
    assert head.weight.grad is None and hidden.grad is not None
    nothing = divergence_sum(hidden[:0], head, lambda rows: teacher[rows], 0.5, 1.0, V)
    assert float(nothing.detach()) == 0.0 and nothing.requires_grad
