"""What replies earn: several reward models combined, scores clipped and whitened."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from rlhf_core.jobs import EvaluateJob, GRPOJob, PPOJob, RewardJob, RLOOJob
from rlhf_core.jobs.ensemble import CombineSettings
from rlhf_core.nn.ensemble import combine_scores, disagreement
from rlhf_core.training.online.scores import member_means, score_metrics, shape_scores, weighted_sum

DIGESTS = {"model": "a" * 64, "prompts": "b" * 64, "reward_model": "c" * 64}
MEMBERS = torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 3.0]])  # (k,B)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [3.0, 1.0]),
        ({"combine": "min"}, [1.0, 0.0]),
        # population standard deviations: sqrt(8 / 3) and sqrt(2)
        ({"combine": "mean_minus_std"}, [3.0 - math.sqrt(8 / 3), 1.0 - math.sqrt(2)]),
        ({"combine": "mean_minus_std", "std_coef": 0.5},
         [3.0 - math.sqrt(8 / 3) / 2, 1.0 - math.sqrt(2) / 2]),
    ],
)  # fmt: skip
def test_members_are_combined_as_by_hand(settings, expected):
    found = combine_scores(MEMBERS, CombineSettings(**settings))
    assert found.tolist() == pytest.approx(expected)
    one = combine_scores(MEMBERS[:1], CombineSettings(**settings))
    assert torch.equal(one, MEMBERS[0]), "one model is itself, to the bit"


def test_members_with_weights_are_a_weighted_sum():
    found = combine_scores(MEMBERS, CombineSettings(member_weights=(2.0, -1.0, 0.5)))
    assert found.tolist() == [2.0 - 3.0 + 2.5, 1.5]
    job = PPOJob(**DIGESTS, ensemble=("d" * 64,), member_weights=(1, 2))
    assert member_means(job, MEMBERS[1:]) == {"reward_model/1": 1.5, "reward_model/2": 4.0}
    assert job.key() != PPOJob(**DIGESTS, ensemble=("d" * 64,)).key()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"member_weights": (1, 2)}, "2 numbers for 1 reward models"),
        ({"ensemble": ("d" * 64,), "member_weights": (0, 0)}, "member_weights are all 0"),
        ({"ensemble": ("d" * 64,), "member_weights": (1, 2), "combine": "min"}, "combine is min"),
    ],
)
def test_weights_fit_the_members(settings, said):
    with pytest.raises(ValidationError, match=said):
        PPOJob(**DIGESTS, **settings)


def test_two_members_less_their_deviation_are_the_lower_one():
    found = combine_scores(MEMBERS[1:], CombineSettings(combine="mean_minus_std"))
    assert found.tolist() == pytest.approx([3.0, 0.0])
    assert disagreement(MEMBERS[1:]).tolist() == [1.0, 1.5]


COMPONENTS = {"model": torch.tensor([-1.0, 0.0, 1.0, 6.0]), "length": torch.tensor([0.0, 0, 1, 1])}
WEIGHTS = {"model": 1.0, "length": -0.5}
FINISHED = torch.tensor([True, True, False, True])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [-1.0, 0.0, 0.5 - 2.0, 5.5]),
        ({"score_clip": 2.5}, [-1.0, 0.0, 0.5 - 2.0, 2.0]),
        # mean 1.25, squares 5.0625 + 1.5625 + 0.5625 + 18.0625 = 25.25, over 3 (unbiased)
        ({"score_whiten": True},
         [-2.25 / 2.9011492, -1.25 / 2.9011492, -0.75 / 2.9011492 - 2.0, 4.25 / 2.9011492]),
        # clipped first: -1, 0, 0.5, 2; mean 0.375, squares 4.6875 over 3
        ({"score_whiten": True, "score_clip": 2.5},
         [-1.375 / 1.25, -0.375 / 1.25, 0.125 / 1.25 - 2.0, 1.625 / 1.25]),
    ],
)  # fmt: skip
def test_scores_are_shaped_as_by_hand(settings, expected):
    job = PPOJob(**DIGESTS, missing_eos_penalty=2.0, **settings)
    found = shape_scores(job, COMPONENTS, WEIGHTS, FINISHED)
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert weighted_sum(COMPONENTS, WEIGHTS).tolist() == [-1.0, 0.0, 0.5, 5.5], "as they are"


def test_rollouts_report_what_is_clipped_and_how_members_disagree():
    job = PPOJob(**DIGESTS, score_clip=1.0)
    found = score_metrics(job, COMPONENTS, torch.tensor([0.5, 1.5]))
    assert found == {"score_clipped": 0.25, "reward_model_std": 1.0}
    assert score_metrics(PPOJob(**DIGESTS), COMPONENTS, None) == {}


@pytest.mark.parametrize(
    ("job", "change", "said"),
    [
        (PPOJob, {"score_clip": 1.0, "rewards": [{"type": "repetition"}], "reward_model": None},
         "score_clip is 1, but rewards has no entry of type model"),
        (PPOJob, {"score_whiten": True, "batch_size": 1}, "a rollout has one reply"),
        (GRPOJob, {"score_whiten": True}, "scale_rewards scales the scores of each group already"),
    ],
)  # fmt: skip
def test_scores_that_cannot_be_shaped_are_refused(job, change, said):
    with pytest.raises(ValidationError, match=said):
        job(**(DIGESTS | change))
    GRPOJob(**DIGESTS, score_whiten=True, scale_rewards=False)  # Dr. GRPO keeps the scale
    RLOOJob(**DIGESTS, score_whiten=True)


def test_keys_know_an_ensemble_and_nothing_of_one_model():
    plain = PPOJob(**DIGESTS)
    assert PPOJob(**DIGESTS, combine="min", std_coef=2.0).key() == plain.key()
    pair = PPOJob(**DIGESTS, ensemble=["d" * 64])
    assert pair.key() != plain.key()
    assert PPOJob(**DIGESTS, ensemble=["d" * 64], combine="min").key() != pair.key()
    assert pair.reward_models == ("c" * 64, "d" * 64)
    assert pair.inputs() == DIGESTS | {"reward_model-2": "d" * 64}
    assert EvaluateJob(base="a" * 64, policy="a" * 64, prompts="b" * 64).reward_models == ()
    reward = RewardJob(model="a" * 64, data="b" * 64)
    several = RewardJob(model="a" * 64, data="b" * 64, members=3, combine="min")
    assert several.key() == reward.key(), "the first of several is the one alone"
