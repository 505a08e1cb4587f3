"""Labelled replies, and combinations of prompts and responses, on one process."""

import pytest

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.data.dataset.writer import write_dataset
from rlhf_core.errors import DataError
from rlhf_core.jobs import KTOJob
from rlhf_core.training.batching import batch_rows
from rlhf_core.training.unpaired import (
    LabelledReplies,
    combination_logps,
    means_by_label,
    mismatched,
    needed_combinations,
)
from tests.rlhf_core.training.alone import ALONE, logp

DIGESTS = {"model": "0" * 64, "data": "1" * 64}


def unpaired(folder, labels, prompts=None):
    rows = [
        {"prompt_ids": [(prompts or range(99))[i]], "completion_ids": [30 + i, 2], "label": label,
         "prompt": "[]", "completion": "", "row": i}
        for i, label in enumerate(labels)
    ]  # fmt: skip
    write_dataset(folder, "unpaired", {"train": rows}, {"source": "test"})
    return LabelledReplies(Rows(folder, "train", ["unpaired", "preference"]))


def test_a_pair_is_a_good_and_a_bad_reply(pairs):
    replies = LabelledReplies(pairs)
    rows = replies.take([0, 3, 4])
    assert len(replies) == 6
    assert [r["completion_ids"] for r in rows] == [[8, 2], [2], [22, 2]]
    assert [r["prompt_ids"] for r in rows] == [[5, 6, 7], [5], [20, 21]]
    assert [r["label"] for r in rows] == [True, False, True]
    assert replies.lengths == ([3, 3, 1, 1, 2, 2], [2, 4, 3, 1, 2, 2])


def test_mismatched_replies_are_to_another_prompt():
    rows = [{"prompt_ids": [p]} for p in (1, 1, 2, 3)]
    assert mismatched(rows, [70, 71, 72, 73]) == [(70, 72), (71, 72), (72, 73), (73, 70)]
    assert mismatched(rows[:2], [70, 71]) == [(70, 71), (71, 70)], "nobody else is there"
    assert mismatched(rows[:1], [70]) == [(70, 70)]
    assert mismatched([], []) == []


def test_a_prompt_with_the_response_of_another_row(policy, tmp_path):
    replies = unpaired(tmp_path, [True, False])
    job = KTOJob(**DIGESTS)
    found = combination_logps(policy, replies, [(0, 0), (0, 1), (1, 0)], ALONE, job)
    for (prompt, response), value in found.items():
        assert value == pytest.approx(logp(policy, [prompt], [30 + response, 2]), rel=1e-5)


def test_needed_combinations_are_all_that_training_uses(tmp_path):
    replies = unpaired(tmp_path, [True, False, True, False])
    job = KTOJob(**DIGESTS, batch_size=2, epochs=2)
    needed = needed_combinations(replies, job, 4)
    assert {(i, i) for i in range(4)} <= set(needed) and needed == sorted(set(needed))
    for step in range(4):
        a, b = batch_rows(4, 2, step, 0)
        assert {(a, b), (b, a)} <= set(needed)


@pytest.mark.parametrize(("label", "words"), [(True, "are good"), (False, "are bad")])
def test_replies_of_one_kind_are_refused(tmp_path, label, words):
    replies = unpaired(tmp_path, [label] * 4)
    with pytest.raises(DataError, match=words):
        needed_combinations(replies, KTOJob(**DIGESTS, batch_size=2), 2)


def test_rewards_are_means_over_their_kind_and_left_out_without_one():
    rows = [{"label": True}, {"label": True}, {"label": False}]
    sums = {"loss": 0.5, "margin": 2.0, "chosen_reward": 3.0, "rejected_reward": 4.0}
    assert means_by_label(sums, rows) == sums | {"chosen_reward": 1.5}
    without = sums | {"rejected_reward": 0.0}
    assert means_by_label(without, rows[:2]) == {"loss": 0.5, "margin": 2.0, "chosen_reward": 1.5}
