"""Batches of pairs and their log-probabilities, on one process and without an optimizer."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rlhf_core.algorithms import dpo, orpo
from rlhf_core.jobs import DPOJob, DPOSettings, KTOSettings, ORPOJob
from rlhf_core.training.batching import batch_rows
from rlhf_core.training.pairs import ScoredPairs
from rlhf_core.training.preference import (
    by_pair,
    collate_replies,
    pair_logps,
    pair_replies,
    pair_response_lengths,
    pair_tokens,
    visited,
)
from tests.rlhf_core.training.alone import ALONE, CPU, PAIRS, logp

DIGESTS = {"model": "0" * 64, "data": "1" * 64}


def test_collated_replies_mark_the_response_alone():
    ids, mask, loss_mask, index = collate_replies([([5, 6], [7]), ([8], [9, 9, 2])], CPU)
    assert ids.tolist() == [[5, 6, 7, 0], [8, 9, 9, 2]]
    assert mask.tolist() == [[True, True, True, False], [True] * 4]
    assert loss_mask.tolist() == [[False, False, True, False], [False, True, True, True]]
    assert index.real.tolist() == [0, 1, 2, 4, 5, 6, 7] and index.loss.tolist() == [2, 5, 6, 7]


def test_pairs_go_in_one_pass_and_come_back_as_pairs():
    replies = pair_replies(PAIRS[:2])
    assert [r[1] for r in replies] == [[8, 2], [12, 13, 2], [9, 10, 11, 2], [2]]
    assert by_pair(torch.tensor([1, 2, 3, 4])).tolist() == [[1, 3], [2, 4]]
    assert pair_tokens(PAIRS[0]) == 12


@pytest.mark.parametrize("micro", [1, 2, 8])
def test_pair_logps_are_those_of_the_model_row_by_row(policy, pairs, micro):
    found = pair_logps(policy, pairs, [0, 2], ALONE, micro)
    assert found.shape == (3, 2) and found[1].isnan().all(), "row 1 was not asked for"
    for number in (0, 2):
        row = PAIRS[number]
        expected = [logp(policy, row["prompt_ids"], row[k]) for k in ("chosen_ids", "rejected_ids")]
        np.testing.assert_allclose(found[number], expected, rtol=1e-5)
    assert pair_response_lengths(pairs).tolist() == [[2, 4], [3, 1], [2, 2]]


def test_only_rows_that_training_will_see_are_visited():
    job = DPOJob(**DIGESTS, batch_size=4, max_steps=2, seed=3)
    seen = visited(100, job, 2)
    assert seen == sorted(batch_rows(100, 4, 0, 3) + batch_rows(100, 4, 1, 3))
    assert visited(8, job, 50) == list(range(8)), "each once, however often"


def test_dpo_compares_with_the_reference_of_the_same_rows():
    reference = torch.tensor([[9.0, 9.0], [-13.0, -14.5]], dtype=torch.float64)
    pairs = ScoredPairs([1], torch.tensor([[-12.0, -15.0]]), torch.tensor([[4, 5]]), 1, 4)
    loss, metrics = dpo.loss(DPOJob(**DIGESTS, beta=0.1), reference, pairs)
    assert loss.item() == pytest.approx(0.620957, abs=1e-6)
    assert metrics["margin"].item() == pytest.approx(0.15, abs=1e-6)


def test_orpo_loss_adds_both_terms():
    pairs = ScoredPairs([0], torch.tensor([[-2.4, -4.5]]), torch.tensor([[2, 3]]), 1, 2)
    loss, metrics = orpo.loss(ORPOJob(**DIGESTS, orpo_lambda=0.5), pairs)
    assert metrics["nll"].item() == pytest.approx(1.2)
    assert metrics["odds_loss"].item() == pytest.approx(0.510652, abs=1e-6)  # means -1.2, -1.5
    assert loss.item() == pytest.approx(1.2 + 0.255326, abs=1e-6)


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValidationError, match="loss is ipo, which has none"):
        DPOSettings(loss="ipo", label_smoothing=0.1)
    with pytest.raises(ValidationError, match="both 0"):
        KTOSettings(desirable_weight=0, undesirable_weight=0)
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        KTOSettings(batch_size=1)
