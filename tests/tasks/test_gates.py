"""Gates on hand-made evaluations."""

import pytest

from rlhf_core.errors import RETRYABLE, GateFailed
from rlhf_core.jobs import EvaluateJob, EvaluateSettings, Gates, RewardJob, RewardSettings
from tasks.gates import check_evaluation, check_reward, judge, judged
from tasks.reporting.past import COLUMNS, PastRun

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
    assert verdict["text"] == "not promoted: min_win_rate (gold) is 0.4, expected at least 0.5"
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


# --------------------------------------------------------------------------- gates of a stage

HELDOUT = {
    "n": 40, "accuracy": 0.575, "low": 0.42, "high": 0.72,
    "baselines": {"length": {"accuracy": 0.6}, "bag_of_words": {"accuracy": 0.5}},
}  # fmt: skip
NUMBERS = {
    "models": {"base": {"length_mean": 5.0}, "sft": {"length_mean": 20.0},
               "policy": {"length_mean": 30.0}},
    "win_rate": {"reward": {"rate": 0.9, "n": 64},
                 "gold": {"rate": 0.45, "n": 64, "low": 0.33, "high": 0.57}},
}  # fmt: skip


def test_reward_model_is_held_to_its_accuracy():
    assert check_reward(RewardSettings(), {"heldout": HELDOUT}) is None
    assert check_reward(RewardSettings(min_heldout_accuracy=0.575), {"heldout": HELDOUT}) is None
    # The interval reaches over the bound; the number does not.
    text = check_reward(RewardSettings(min_heldout_accuracy=0.6), {"heldout": HELDOUT})
    assert text.startswith(
        "The reward model's accuracy on 40 held-out pairs is 0.575 (95 % interval 0.42 to 0.72), "
        "expected at least 0.6 (reward.min_heldout_accuracy); a trivial judge reaches 0.6."
    )
    assert "What usually helps" in text
    for nothing in ({}, {"heldout": {}}):
        text = check_reward(RewardSettings(min_heldout_accuracy=0.6), nothing)
        assert "no accuracy was measured" in text and "heldout_fraction" in text


def test_finished_model_is_held_to_its_win_rate():
    assert check_evaluation(EvaluateSettings(), NUMBERS, "ppo") is None
    assert check_evaluation(EvaluateSettings(min_win_rate=0.45), NUMBERS, "ppo") is None
    text = check_evaluation(EvaluateSettings(min_win_rate=0.5), NUMBERS, "ppo")
    assert "win on 0.45 of 64 prompts (95 % interval 0.33 to 0.57) as judged by gold, " in text
    assert "at least 0.5 (evaluate.min_win_rate)" in text
    without = {"win_rate": {"reward": {"rate": 0.4}}}
    assert "as judged by reward" in check_evaluation(
        EvaluateSettings(min_win_rate=0.5), without, "ppo"
    )
    assert "no win rate was measured" in check_evaluation(
        EvaluateSettings(min_win_rate=0.5), {}, "ppo"
    )


def test_win_rate_is_that_against_the_champion_where_they_were_compared():
    settings = EvaluateSettings(min_win_rate=0.45, max_length_ratio=1.5)
    comparison = {"win_rate": {"gold": {"rate": 0.4, "n": 64}}, "models": {}}
    text = check_evaluation(settings, NUMBERS, "ppo", comparison)
    assert "replies win against the champion on 0.4 of 64 prompts as judged by gold" in text
    assert "max_length_ratio" not in text, "lengths stay those of the model that it started from"
    better = {"win_rate": {"gold": {"rate": 0.45, "n": 64}}}
    assert check_evaluation(settings, NUMBERS, "ppo", better) is None


def test_finished_model_is_held_to_its_length():
    assert check_evaluation(EvaluateSettings(max_length_ratio=1.5), NUMBERS, "ppo") is None
    text = check_evaluation(EvaluateSettings(max_length_ratio=1.4), NUMBERS, "ppo")
    assert "have 30 tokens, 1.5 times the 20 of the model it started from" in text
    assert "at most 1.4 times (evaluate.max_length_ratio)" in text
    models = {"base": {"length_mean": 5.0}, "policy": {"length_mean": 30.0}}
    text = check_evaluation(EvaluateSettings(max_length_ratio=5.0), {"models": models}, "ppo")
    assert "6 times the 5" in text
    assert "no lengths" in check_evaluation(EvaluateSettings(max_length_ratio=5.0), {}, "ppo")


def test_all_failed_gates_are_told_at_once():
    text = check_evaluation(
        EvaluateSettings(min_win_rate=0.5, max_length_ratio=1.0), NUMBERS, "ppo"
    )
    assert "evaluate.min_win_rate" in text and "evaluate.max_length_ratio" in text


@pytest.mark.parametrize(
    ("stage", "freer", "tighter"),
    [
        ("grpo", "a lower grpo.kl_coef, a reward model", "a higher grpo.kl_coef or grpo.missing"),
        ("kto", "a lower kto.beta, more or clearer pairs", "a higher kto.beta, fewer steps"),
        ("simpo", "a higher simpo.learning_rate, more", "a lower simpo.learning_rate, fewer"),
        ("sft", "a higher sft.learning_rate, more", "a lower sft.learning_rate, fewer"),
    ],
)
def test_advice_is_about_the_stage_that_made_the_model(stage, freer, tighter):
    strict = EvaluateSettings(min_win_rate=0.5, max_length_ratio=1.0)
    text = check_evaluation(strict, NUMBERS, stage)
    assert freer in text and tighter in text and "ppo" not in text


def test_gate_that_failed_is_not_tried_again():
    assert GateFailed("x").category == "gate" and "gate" not in RETRYABLE


DIGEST = "0" * 64


@pytest.mark.parametrize(
    ("job", "gates"),
    [
        (RewardJob(model=DIGEST, data=DIGEST), {"min_heldout_accuracy": 0.7}),
        (
            EvaluateJob(base=DIGEST, sft=DIGEST, policy=DIGEST, reward_model=DIGEST,
                        prompts=DIGEST, sft_data=DIGEST),
            {"min_win_rate": 0.5, "max_length_ratio": 2.0},
        ),
    ],
)  # fmt: skip
def test_gates_do_not_change_what_a_stage_is(job, gates):
    assert job.model_copy(update=gates).key() == job.key()
    assert job.model_copy(update={"seed": 1}).key() != job.key()


def test_gates_and_tables_go_by_the_same_judge():
    """The one that had least to do with the training, in whatever order they are stored."""
    rates = {"gold": {"rate": 0.6}, "reward": {"rate": 0.9}, "judge": {"rate": 0.3}}
    for left_out, chosen in [((), "judge"), (("judge",), "gold"), (("judge", "gold"), "reward")]:
        found = {"win_rate": {k: v for k, v in rates.items() if k not in left_out}}
        assert judged(found) == (chosen, rates[chosen])
        run = PastRun({"id": "x"}, found)
        shown = next(column for column in COLUMNS if column.name == "win").value(run)
        assert shown == (rates[chosen]["rate"], f"{rates[chosen]['rate']:.0%} {chosen}")
