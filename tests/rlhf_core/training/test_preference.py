"""What the preference stages share, on one process and without an optimizer."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rlhf_core.algorithms.kto import LabelledReplies, look_ahead, reply_logps, reported, strangers
from rlhf_core.algorithms.orpo import orpo_loss
from rlhf_core.data.dataset.reading import Rows
from rlhf_core.data.dataset.writer import write_dataset
from rlhf_core.errors import DataError
from rlhf_core.jobs import DPOJob, DPOSettings, KTOJob, KTOSettings, ORPOJob
from rlhf_core.models.random_model import make_model, make_tokenizer
from rlhf_core.nn.modules import Policy
from rlhf_core.runtime.distributed import Group
from rlhf_core.training.batching import batch_rows
from rlhf_core.training.preference import (
    by_pair,
    collate_replies,
    pair_logps,
    pair_replies,
    pair_response_lengths,
    pair_tokens,
    visited,
)

CPU = torch.device("cpu")
DIGESTS = {"model": "0" * 64, "data": "1" * 64}


class One(Group):
    """The group of one process, without a process group."""

    def __init__(self) -> None:
        self.rank, self.size, self.device = 0, 1, CPU


ALONE = SimpleNamespace(
    group=One(),
    device=CPU,
    autocast=contextlib.nullcontext,
)
PAIRS = [
    {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 2], "rejected_ids": [9, 10, 11, 2]},
    {"prompt_ids": [5], "chosen_ids": [12, 13, 2], "rejected_ids": [2]},
    {"prompt_ids": [20, 21], "chosen_ids": [22, 2], "rejected_ids": [23, 2]},
]


@pytest.fixture(scope="module")
def policy():
    return Policy(make_model("llama", make_tokenizer(), seed=0).eval())


@pytest.fixture
def pairs(tmp_path):
    rows = [row | {"prompt": "[]", "chosen": "", "rejected": "", "row": i}
            for i, row in enumerate(PAIRS)]  # fmt: skip
    write_dataset(tmp_path, "preference", {"train": rows}, {"source": "test"})
    return Rows(tmp_path, "train")


def unpaired(folder, labels, prompts=None):
    rows = [
        {"prompt_ids": [(prompts or range(99))[i]], "completion_ids": [30 + i, 2], "label": label,
         "prompt": "[]", "completion": "", "row": i}
        for i, label in enumerate(labels)
    ]  # fmt: skip
    write_dataset(folder, "unpaired", {"train": rows}, {"source": "test"})
    return LabelledReplies(Rows(folder, "train", ["unpaired", "preference"]))


def logp(policy, prompt, response):
    """The oracle: the model's own logits, one sequence at a time and without padding."""
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        logits = policy.model(input_ids=ids).logits[0].double()
    steps = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
    return float(steps[torch.arange(len(response)), torch.tensor(response)].sum())


def test_collated_replies_mark_the_response_alone():
    ids, mask, loss_mask = collate_replies([([5, 6], [7]), ([8], [9, 9, 2])], CPU)
    assert ids.tolist() == [[5, 6, 7, 0], [8, 9, 9, 2]]
    assert mask.tolist() == [[True, True, True, False], [True] * 4]
    assert loss_mask.tolist() == [[False, False, True, False], [False, True, True, True]]


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


def test_a_pair_is_a_good_and_a_bad_reply(pairs):
    replies = LabelledReplies(pairs)
    rows = replies.take([0, 3, 4])
    assert len(replies) == 6
    assert [r["completion_ids"] for r in rows] == [[8, 2], [2], [22, 2]]
    assert [r["prompt_ids"] for r in rows] == [[5, 6, 7], [5], [20, 21]]
    assert [r["label"] for r in rows] == [True, False, True]
    assert replies.lengths == ([3, 3, 1, 1, 2, 2], [2, 4, 3, 1, 2, 2])


def test_strangers_are_replies_to_another_prompt():
    rows = [{"prompt_ids": [p]} for p in (1, 1, 2, 3)]
    assert strangers(rows, [70, 71, 72, 73]) == [(70, 72), (71, 72), (72, 73), (73, 70)]
    assert strangers(rows[:2], [70, 71]) == [(70, 71), (71, 70)], "nobody else is there"
    assert strangers(rows[:1], [70]) == [(70, 70)]
    assert strangers([], []) == []


def test_a_prompt_with_the_response_of_another_row(policy, tmp_path):
    replies = unpaired(tmp_path, [True, False])
    job = KTOJob(**DIGESTS)
    found = reply_logps(policy, replies, [(0, 0), (0, 1), (1, 0)], ALONE, job)
    for (prompt, response), value in found.items():
        assert value == pytest.approx(logp(policy, [prompt], [30 + response, 2]), rel=1e-5)


def test_look_ahead_knows_all_that_will_be_asked(tmp_path):
    replies = unpaired(tmp_path, [True, False, True, False])
    job = KTOJob(**DIGESTS, batch_size=2, epochs=2)
    asked = look_ahead(replies, job, 4)
    assert {(i, i) for i in range(4)} <= set(asked) and asked == sorted(set(asked))
    for step in range(4):
        a, b = batch_rows(4, 2, step, 0)
        assert {(a, b), (b, a)} <= set(asked)


@pytest.mark.parametrize(("label", "words"), [(True, "are good"), (False, "are bad")])
def test_replies_of_one_kind_are_refused(tmp_path, label, words):
    replies = unpaired(tmp_path, [label] * 4)
    with pytest.raises(DataError, match=words):
        look_ahead(replies, KTOJob(**DIGESTS, batch_size=2), 2)


def test_rewards_are_means_over_their_kind_and_left_out_without_one():
    rows = [{"label": True}, {"label": True}, {"label": False}]
    assert reported([0.5, 1.0, 2.0, 3.0, 4.0], rows) == {
        "loss": 0.5, "accuracy": 1.0, "margin": 2.0, "chosen_reward": 1.5, "rejected_reward": 4.0,
    }  # fmt: skip
    assert "rejected_reward" not in reported([0.5, 1.0, 2.0, 3.0, 0.0], rows[:2])


def test_orpo_loss_adds_both_terms():
    logps, lengths = torch.tensor([[-2.4, -4.5]]), torch.tensor([[2, 3]])
    loss, metrics = orpo_loss(ORPOJob(**DIGESTS, orpo_lambda=0.5), logps, lengths, 1, 2)
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
