"""The linear probe against its stationary point and on features with a known direction."""

import pytest
import torch

from rlhf_core.training.probe import fit_probe, logistic


def test_logistic_is_stationary():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = logistic(x, 2.0)
    gradient = -(x * torch.sigmoid(-(x @ weight)).unsqueeze(1)).sum(0) + 2.0 * weight
    assert gradient.abs().max() < 1e-5


def test_probe_finds_the_direction_that_decides_whatever_its_scale():
    generator = torch.Generator().manual_seed(1)
    n, d = 400, 10
    truth = torch.randn(d, generator=generator)
    scale = torch.logspace(-2, 2, d)  # features of very different size
    a, b = (torch.randn(n, d, generator=generator) for _ in range(2))
    swap = ((a - b) @ truth < 0).unsqueeze(1)
    chosen, rejected = torch.where(swap, b, a) * scale, torch.where(swap, a, b) * scale
    weight, _, accuracy = fit_probe(chosen, rejected, [f"prompt {i // 2}" for i in range(n)])
    assert accuracy > 0.9
    assert torch.cosine_similarity(weight * scale, truth, dim=0) > 0.95
    assert (((chosen - rejected) @ weight) > 0).float().mean() > 0.95


def test_probe_on_noise_measures_chance():
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(400, 20, generator=generator) for _ in range(2))
    _, _, accuracy = fit_probe(a, b, [str(i) for i in range(400)])
    assert accuracy == pytest.approx(0.5, abs=0.08)
