"""Replies that normalise a reward model: of prompts, each counted once."""

from __future__ import annotations

from types import SimpleNamespace

from rlhf_core.jobs import RewardJob
from rlhf_core.training.calibration import pairs_by_prompt, sft_replies

# Two prompts, the first with all comparisons of three replies, as `label` writes them.
PAIRS = [
    {"prompt_ids": [7], "chosen_ids": [1], "rejected_ids": [2]},
    {"prompt_ids": [7], "chosen_ids": [1], "rejected_ids": [3]},
    {"prompt_ids": [7], "chosen_ids": [2], "rejected_ids": [3]},
    {"prompt_ids": [8], "chosen_ids": [4], "rejected_ids": [5]},
    {"prompt_ids": [9], "chosen_ids": [1], "rejected_ids": [6]},
]


def test_prompts_are_counted_not_pairs():
    found = pairs_by_prompt(PAIRS, 2)
    assert list(found) == [(7,), (8,)]
    assert [len(pairs) for pairs in found.values()] == [3, 1]
    assert list(pairs_by_prompt(PAIRS, 64)) == [(7,), (8,), (9,)]


def test_each_sampled_reply_to_a_prompt_counts_once():
    model = "a" * 64
    job = RewardJob(model=model, data="b" * 64, normalization_prompts=2)
    artifact = SimpleNamespace(metadata={"sampled_from": model})
    context = SimpleNamespace(store=SimpleNamespace(get=lambda digest: artifact))
    found = sft_replies(job, context, None, None, PAIRS)
    assert found == [[7, 1], [7, 2], [7, 3], [8, 4], [8, 5]]
