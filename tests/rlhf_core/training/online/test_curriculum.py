"""Which levels of a curriculum are unlocked, by hand."""

import pytest
from pydantic import ValidationError

from rlhf_core.jobs import GRPOJob, GRPOSettings
from rlhf_core.jobs.online import Curriculum
from rlhf_core.training.online.curriculum import newest_level


def lines(*pairs):
    """(level, pass rate or None) of each rollout."""
    return [
        {"level": level} | ({} if rate is None else {"level_pass_rate": rate})
        for level, rate in pairs
    ]


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ([], 1),
        ([(1, 1.0)], 1),  # the window is not full
        ([(1, 0.5), (1, 0.9)], 1),  # 0.7 is not more than 0.7
        ([(1, 0.5), (1, 0.91)], 2),
        ([(1, 0.0), (1, 0.9), (1, 0.9)], 2),  # the last two count
        ([(1, 0.9), (1, None), (1, 0.9)], 2),  # a rollout without a prompt of the level
        ([(1, 0.9), (1, 0.9), (2, 1.0)], 2),  # counted anew from the unlocking
        ([(1, 0.9), (1, 0.9), (2, 0.8), (2, 0.8)], 3),
        ([(1, 1.0), (1, 1.0), (2, 1.0), (2, 1.0), (3, 1.0), (3, 1.0), (3, 1.0)], 3),  # the last
        ([(1, 0.9), (1, 0.9), (2, 0.0), (2, 0.0)], 2),  # no level is locked again
    ],
)
def test_next_level_is_unlocked_by_the_pass_rate(seen, expected):
    assert newest_level(Curriculum(pass_rate=0.7, window=2), lines(*seen), 3) == expected


def test_evaluations_between_the_rollouts_do_not_count():
    seen = lines((1, 0.9), (1, 0.9))
    assert newest_level(Curriculum(window=2), [{"heldout_reward": 1.0}, *seen], 3) == 2


def test_curriculum_that_is_off_leaves_the_key_as_it_was():
    digests = {"model": "a" * 64, "prompts": "b" * 64, "reward_model": "c" * 64}
    job = GRPOJob(**digests)
    assert "curriculum" not in job.key_settings()
    assert GRPOJob(**digests, curriculum={}).key() != job.key()


def test_curriculum_is_refused_where_prompts_are_taken_ahead():
    with pytest.raises(ValidationError, match=r"rollout.placement is separate, where prompts are"):
        GRPOSettings(curriculum={}, rollout={"placement": "separate"})
