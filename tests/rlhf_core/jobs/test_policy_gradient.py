"""Settings of the objectives: which go together, and which leave older stage keys as they were."""

import pytest
from pydantic import ValidationError

from rlhf_core.jobs import (
    GRPOJob,
    GRPOSettings,
    PPOJob,
    PPOSettings,
    ReinforcePPJob,
    ReinforcePPSettings,
    RLOOJob,
    RLOOSettings,
)

INPUTS = {"model": "0" * 64, "prompts": "1" * 64, "reward_model": "2" * 64}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_correction": True, "kl_in": "reward"}, "kl_in is reward; set kl_in to loss"),
        ({"kl_in": "loss", "kl_estimator": "k1"}, "the gradient of k1 is 0 on average"),
        ({"kl_in": "loss", "kl_estimator": "k2", "kl_correction": True}, "gradient of k2 wrong"),
        ({"dual_clip": 1.2}, "within the clip, which goes up to 1.2; raise dual_clip"),
        ({"dual_clip": 1.5, "clip_range_high": 0.6}, "within the clip, which goes up to 1.6"),
        ({"dual_clip": 1.0}, "greater than 1"),
        ({"clip_range_high": 0.0}, "greater than 0"),
    ],
)
@pytest.mark.parametrize("kind", [PPOSettings, GRPOSettings, RLOOSettings, ReinforcePPSettings])
def test_contradictions_of_clip_and_kl_are_refused(kind, settings, message):
    with pytest.raises(ValidationError, match=message):
        kind(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "cispo"}, "clip_range_high is empty, so its weights have no bound"),
        ({"objective": "cispo", "clip_range_high": 4, "clip_range": 0.1}, "has no lower bound"),
        ({"objective": "cispo", "clip_range_high": 4, "dual_clip": 9}, "cispo bounds the ratio"),
        ({"objective": "dppo", "clip_range_high": 1.5}, "the change of a probability, below 1"),
        ({"objective": "ppo"}, "'clip', 'gspo', 'cispo' or 'dppo'"),
    ],
)
@pytest.mark.parametrize("kind", [PPOSettings, GRPOSettings, ReinforcePPSettings])
def test_objectives_without_their_bounds_are_refused(kind, settings, message):
    with pytest.raises(ValidationError, match=message):
        kind(**settings)


@pytest.mark.parametrize("kind", [PPOSettings, ReinforcePPSettings])
def test_gspo_is_refused_where_advantages_differ_within_a_reply(kind):
    with pytest.raises(ValidationError, match="an advantage for each token"):
        kind(objective="gspo")
    assert GRPOSettings(objective="gspo", clip_range=3e-4, clip_range_high=4e-4)
    with pytest.raises(ValidationError, match="gspo bounds the ratio otherwise"):
        GRPOSettings(objective="gspo", dual_clip=3.0)


def test_rloo_has_one_action_and_no_objective():
    with pytest.raises(ValidationError, match="objective"):
        RLOOSettings(objective="clip")


def test_estimator_of_the_kl_follows_its_place():
    assert (PPOSettings().kl_kind, GRPOSettings().kl_kind) == ("k1", "k3")
    assert (PPOSettings(kl_in="loss").kl_kind, GRPOSettings(kl_in="reward").kl_kind) == ("k3", "k1")
    assert GRPOSettings(kl_estimator="k2").kl_kind == "k2"
    assert PPOSettings().kl_is_rewarded and GRPOSettings(kl_in="reward").kl_is_rewarded
    assert not PPOSettings(kl_coef=0.0).kl_is_rewarded and not GRPOSettings().kl_is_rewarded


@pytest.mark.parametrize(
    ("earlier", "current"), [("reply", "seq-mean-token-mean"), ("token", "token-mean")]
)
def test_earlier_names_of_averages_are_taken_and_keep_their_keys(earlier, current):
    old, new = (GRPOJob(**INPUTS, average=name) for name in (earlier, current))
    assert old.average == new.average == current
    assert old.key() == new.key() and old.key_settings()["average"] == earlier
    assert GRPOSettings().average == "seq-mean-token-mean"
    with pytest.raises(ValidationError, match="token-mean"):
        GRPOSettings(average="mean")


@pytest.mark.parametrize("kind", [PPOJob, GRPOJob, RLOOJob, ReinforcePPJob])
def test_settings_of_the_objective_count_in_the_key_unless_they_are_the_defaults(kind):
    job = kind(**INPUTS)
    later = {"clip_range_high", "dual_clip", "objective", "kl_in", "kl_estimator", "kl_correction"}
    assert not later & job.key_settings().keys()
    other = {"clip_range_high": 0.28, "dual_clip": 3.0, "kl_estimator": "k2"}
    place = "loss" if job.kl_in == "reward" else "reward"
    keys = {job.key(), kind(**INPUTS, kl_in=place).key()}
    keys |= {kind(**INPUTS, **{name: value}).key() for name, value in other.items()}
    assert len(keys) == 5
