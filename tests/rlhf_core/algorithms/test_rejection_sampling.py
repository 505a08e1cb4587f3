"""Best-of-n SFT: which replies are kept, by hand; and its two stages on a tiny model."""

import json

import pytest
from pydantic import ValidationError

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.errors import DataError
from rlhf_core.jobs import Resources
from rlhf_core.jobs.best_of_n import BestOfNJob, RejectionSamplingJob, RejectionSamplingSettings
from rlhf_core.rollout.replies import Reply
from rlhf_core.stages.best_of_n import Kept, demonstration, select

#        0     1     2     3     4     5
IDS = [[5], [6], [5], [7], [8], [9]]
SCORES = [0.5, 1.0, 0.5, 1.0, 2.0, -1.0]
FINISHED = [True, True, True, True, False, True]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # 4 was cut; 1 and 3 are equally good, and 1 came first; 2 is 0 again.
        ({}, Kept([1], unfinished=1, repeated=1)),
        ({"keep": 9}, Kept([1, 3, 0, 5], unfinished=1, repeated=1)),
        ({"keep": 9, "min_score": 0.5}, Kept([1, 3, 0], unfinished=1, repeated=1, too_low=1)),
        ({"min_score": 1.5}, Kept([], unfinished=1, repeated=1, too_low=4)),
        ({"keep": 2, "min_score": 1.0, "unfinished": True},
         Kept([4, 1], repeated=1, too_low=2)),
    ],
)  # fmt: skip
def test_best_different_replies_are_kept(settings, expected):
    given = {"keep": 1, "min_score": None, "unfinished": False} | settings
    assert select(IDS, SCORES, FINISHED, **given) == expected


def test_reply_that_was_cut_does_not_hide_an_equal_one_that_ended():
    """A reply as long as the limit may end there: the end-of-turn token tells them apart."""
    found = select([[5, 6], [5, 2]], [1.0, 0.5], [False, True], keep=1, min_score=None,
                   unfinished=False)  # fmt: skip
    assert found == Kept([1], unfinished=1)


def test_demonstration_trains_on_the_reply_alone():
    talk = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]
    item = {"prompt_ids": [1, 2, 3], "row": 7, "prompt": json.dumps(talk)}
    row = demonstration(item, Reply([4, 2], -0.5, True), 1.5)
    assert row == {
        "input_ids": [1, 2, 3, 4, 2], "trainable": [False, False, False, True, True],
        "prompt": "Hi", "score": 1.5, "row": 7,
    }  # fmt: skip


def test_settings_that_would_keep_everything_are_refused():
    with pytest.raises(ValidationError, match="keep_per_prompt is 9, more than samples_per_prom"):
        RejectionSamplingSettings(keep_per_prompt=9)
    with pytest.raises(ValidationError, match="every reply would be kept; sample at least 2"):
        RejectionSamplingSettings(samples_per_prompt=1)


# ------------------------------------------------------------------------------------ stages


@pytest.fixture
def sampled(models, data, own_home):
    def made(**settings):
        values = {
            "model": models["llama"], "prompts": data["prompts"], "max_new_tokens": 6,
            "rewards": [{"type": "length", "target": 2, "width": 2}], "samples_per_prompt": 8,
            "keep_unfinished": True, "max_heldout_prompts": 16,
            "resources": Resources(threads=1, device="cpu"),
        }  # fmt: skip
        return BestOfNJob(**(values | settings))

    return made


@pytest.mark.slow
def test_policy_learns_what_is_kept(stages, data, models, sampled):
    """Two rounds: what the second one samples scores more, and more of it is near the target."""
    first = stages.train_here(sampled(), "rs-sample")
    counts = first.metadata["metrics"]
    assert counts["train_score_kept"] > counts["train_score_sampled"]
    rows = Rows(stages.store.fetch(first.digest), "train", "sft")
    assert len(rows) == counts["train_replies"] == counts["train_prompts"]
    assert all(row["score"] <= 1.0 for row in rows.take(range(len(rows))))
    job = RejectionSamplingJob(
        model=models["llama"], data=first.digest, learning_rate=0.01, batch_size=16, epochs=6,
        precision="fp32", resources=Resources(threads=1, device="cpu"),
    )  # fmt: skip
    policy = stages.train_here(job, "rs-sft")
    again = stages.train_here(sampled(model=policy.digest, seed=1), "rs-again")
    before, after = (x.metadata["metrics"]["heldout_score_sampled"] for x in (first, again))
    assert after - before > 0.25 * (1.0 - before), (before, after)  # 1 is the best score


@pytest.mark.slow
def test_two_ranks_keep_what_one_does(run_plan, data, models, random_rewards, sampled):
    """The reward model's scores differ by rounding alone, so the same replies are the best."""
    job = sampled(
        rewards=[{"type": "model"}, {"type": "length", "target": 2, "width": 4}],
        reward_model=random_rewards[0], ensemble=random_rewards[1:], max_prompts=12,
    )  # fmt: skip
    found = []
    for ranks in (1, 2):
        run = run_plan(ranks, {"best": (job, {})})["best"]
        rows = Rows(run.store.fetch(run.artifact.digest), "train", "sft")
        found.append(rows.take(range(len(rows))))
    one, two = found
    assert [row["input_ids"] for row in one] == [row["input_ids"] for row in two]
    assert [row["score"] for row in one] == pytest.approx([row["score"] for row in two], abs=1e-5)


@pytest.mark.slow
def test_nothing_kept_says_why(stages, sampled):
    job = sampled(keep_unfinished=False, min_score=7.0, max_prompts=4, samples_per_prompt=2)
    with pytest.raises(DataError, match=r"No reply to any of 4 prompts was kept: .* of 8 were cut"):
        stages.train_here(job, "rs-nothing")
