"""Random numbers of a row, and the tokens that they choose."""

import math

import numpy as np
import pytest
import torch

from rlhf_core.rollout import sampling


@pytest.mark.parametrize("vocabulary", [1, 3, 64, 65, 200, 1000])
def test_inverse_cdf_equals_numpys_search_of_the_cumulative_sum(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = 2 * torch.randn(500, vocabulary, generator=generator)
    uniforms = torch.rand(500, generator=generator, dtype=torch.float64)
    token, norm = sampling.sample_inverse_cdf(logits, uniforms)
    torch.testing.assert_close(norm, logits.double().logsumexp(1), atol=1e-5, rtol=0)
    p = torch.softmax(logits.double(), dim=1).numpy()
    want = [
        np.searchsorted(np.cumsum(r), u, side="right") for r, u in zip(p, uniforms, strict=True)
    ]
    assert (token.numpy() == want).mean() > 0.995  # the rest fell on a rounded edge
    assert np.abs(token.numpy() - want).max() <= 1


def test_inverse_cdf_never_draws_an_impossible_token() -> None:
    logits = torch.full((4, 200), -math.inf)
    logits[:, [70, 130]] = 0.0
    for u in (0.0, 0.25, 0.5, 0.75, 1 - 2**-53):
        token, _ = sampling.sample_inverse_cdf(logits, torch.full((4,), u, dtype=torch.float64))
        assert token.tolist() == [70 if u < 0.5 else 130] * 4


def test_row_uniforms_depend_on_the_rows_seed_only() -> None:
    both = sampling.row_uniforms([3, 2**64 - 1], 6)
    assert both.dtype == torch.float64 and both.shape == (2, 6)
    assert torch.equal(both[1:], sampling.row_uniforms([2**64 - 1], 6))
    assert torch.equal(both[:, :4], sampling.row_uniforms([3, 2**64 - 1], 4))
    many = sampling.row_uniforms(range(2000), 10)
    assert many.min() >= 0 and many.max() < 1
    assert abs(many.mean().item() - 0.5) < 5 / math.sqrt(12 * 20000)
    assert abs(np.corrcoef(many[:-1, 0], many[1:, 0])[0, 1]) < 0.1
    assert sampling.row_uniforms([], 3).shape == (0, 3)


def test_row_seeds_differ_by_seed_step_and_row_and_do_not_depend_on_the_split() -> None:
    rows = sampling.make_row_seeds(1, 2, range(8))
    assert sampling.make_row_seeds(1, 2, [3, 5]) == [rows[3], rows[5]]
    others = sampling.make_row_seeds(1, 3, range(8)) + sampling.make_row_seeds(2, 2, range(8))
    assert len({*rows, *others}) == 24
