"""Gates on hand-made evaluations."""

from rlhf_core.jobs import Gates
from tasks.gates import judge

GOOD = {
    "reward_model": {"accuracy": 0.7},
    "models": {"policy": {"kl_mean": 6.0}},
    "win_rate": {"reward": {"rate": 0.9}, "gold": {"rate": 0.6}},
}


def test_good_model_passes():
    verdict = judge(Gates(), GOOD, None)
    assert verdict["failed"] == []
    assert verdict["text"] == "promoted: 3 of 3 gates passed"
    assert "the SFT model (none published)" in verdict["markdown"]


def test_champion_that_is_better_keeps_its_place():
    verdict = judge(Gates(), GOOD, {"win_rate": {"gold": {"rate": 0.4}}})
    assert verdict["failed"] == ["min_win_rate (gold)"]
    assert verdict["text"] == "not promoted: min_win_rate (gold) is 0.4, needed is at least 0.5"
    assert "| min_win_rate (gold) | 0.4 | at least 0.5 | **failed** |" in verdict["markdown"]


def test_reward_model_judges_where_there_is_no_gold_judge():
    without = {**GOOD, "win_rate": {"reward": {"rate": 0.45}}}
    assert judge(Gates(), without, None)["failed"] == ["min_win_rate (reward)"]


def test_bounds_are_those_of_the_settings():
    strict = Gates(min_reward_accuracy=0.8, max_kl=5.0, min_win_rate=0.7)
    assert judge(strict, GOOD, None)["failed"] == [
        "min_reward_accuracy",
        "max_kl",
        "min_win_rate (gold)",
    ]


def test_what_was_not_measured_does_not_pass():
    verdict = judge(Gates(), {}, None)
    assert len(verdict["failed"]) == 3
    assert "min_reward_accuracy is not measured" in verdict["text"]
