"""How lengths explain preferences, and how scores go with lengths."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_core.losses.supervised import pairwise_loss
from rlhf_core.training.length import length_correlation, length_weight


@pytest.mark.parametrize("sign", (1, -1))
def test_weight_of_a_length_is_the_logit_of_the_longer_reply(sign):
    # 3,000 of 4,000 pairs have the reply chosen that is 10 tokens longer: logit log 3.
    differences = sign * 10.0 * torch.tensor([1.0] * 3000 + [-1.0] * 1000, dtype=torch.float64)
    said: list[str] = []
    weight = length_weight(differences, said.append)
    assert weight == pytest.approx(sign * math.log(3) / 10, rel=2e-3)  # the penalty is small
    assert f"{100 * weight:+.3g} for 100" in said[0]


def test_equal_lengths_explain_nothing():
    said: list[str] = []
    assert length_weight(torch.zeros(8, dtype=torch.float64), said.append) == 0.0
    assert "equally long" in said[0]


def test_correlation_with_length_does_not_depend_on_which_reply_is_first():
    margins, lengths = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([2.0, 1.0, 2.0])
    # (2 + 2 - 2) / sqrt(6 * 9)
    assert length_correlation(margins, lengths) == pytest.approx(2 / math.sqrt(54))
    swapped = torch.tensor([1.0, -1.0, -1.0])
    assert length_correlation(margins * swapped, lengths * swapped) == pytest.approx(
        2 / math.sqrt(54)
    )
    assert length_correlation(3 * lengths, lengths) == pytest.approx(1.0)
    assert length_correlation(margins, torch.zeros(3)) == 0.0


def test_a_score_trained_beside_the_length_expert_leaves_length_alone():
    # A linear score of quality and length; people prefer by both, one as much as the other.
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4000, 2, generator=generator, dtype=torch.float64)
    draw = torch.rand(4000, generator=generator, dtype=torch.float64)
    pairs = torch.where(draw < features.sum(dim=1).sigmoid(), 1.0, -1.0).unsqueeze(1) * features

    def trained(margins):
        weight = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight], max_iter=100)

        def closure():
            optimizer.zero_grad()
            scores = pairs @ weight
            loss, _ = pairwise_loss(scores, torch.zeros_like(scores), margins=margins)
            loss.backward()
            return loss

        optimizer.step(closure)
        correlation = length_correlation((pairs @ weight).detach(), pairs[:, 1])
        return weight.detach(), correlation

    lengths = pairs[:, 1]
    plain, with_length = trained(None)
    debiased, without = trained(-length_weight(lengths, lambda text: None) * lengths)
    assert plain.tolist() == pytest.approx([1.0, 1.0], abs=0.1)
    assert with_length > 0.65
    assert debiased[0] > 0.8, "quality is learned all the same"
    assert abs(debiased[1]) < 0.25 and abs(without) < 0.25
