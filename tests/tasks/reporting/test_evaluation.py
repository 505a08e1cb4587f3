"""The evaluation's tables and its verdict."""

import json
from pathlib import Path

import pytest

from tasks.reporting.evaluation import Evaluation

FULL = json.loads((Path(__file__).parents[1] / "stubs/rlhf_stub/evaluation.json").read_text())


def evaluation(reward=(0.0, 1.0), gold=None):
    def row(mean, gold_mean):
        found = {"reward_mean": mean, "reward_se": 0.1}
        return found | ({} if gold_mean is None else {"gold_mean": gold_mean, "gold_se": 0.1})

    golds = gold or (None, None)
    return Evaluation(
        {"models": {m: row(reward[i], golds[i]) for i, m in enumerate(("sft", "policy"))}}
    )


def test_table_has_a_column_per_model_and_a_row_per_number():
    table = Evaluation(FULL).models().splitlines()
    assert table[0] == "| mean ± standard error (128 held-out prompts) | base | SFT | PPO |"
    assert "| reward | -0.210 ± 0.080 | 0.020 ± 0.090 | 1.310 ± 0.070 |" in table
    assert "| held-out loss | 2.910 | 2.550 | – |" in table
    assert "| finished replies | 71 % | 93 % | 90 % |" in table


def test_reward_model_stands_beside_its_baselines():
    table = Evaluation(FULL).reward_model()
    assert "| reward model | 78.0 | 70.0 to 84.0 |" in table
    assert "| longer reply wins | 55.0 |" in table
    assert "| bag of words | 71.0 |" in table


def test_win_rates_are_given_with_their_interval():
    assert "81 % (73 to 87 %) of 128 prompts for the reward model" in Evaluation(FULL).win_rates()


@pytest.mark.parametrize(
    ("reward", "gold", "text"),
    [
        ((0, 1), (0, 1), "agrees: the policy became better"),
        ((0, 1), (0, -1), "**the gold score fell while the reward rose"),
        ((0, 1), (0, 0.1), "no evidence that the policy became better"),
        ((0, 0.1), (0, 0.1), "neither rose"),
        ((0, 0.1), (0, 1), "the gold score rose, the reward did not"),
        ((1, 0), (1, 0), "**the gold score fell.**"),
        ((0, 1), None, "it is unknown whether"),
    ],
)
def test_verdict_says_whether_gold_and_proxy_agree(reward, gold, text):
    assert text in evaluation(reward, gold).verdict()


def test_paired_gain_is_preferred_for_the_verdict():
    found = {**evaluation((0, 1), (0, 0.1)).data, "gold_gain": {"mean": 0.1, "se": 0.01}}
    assert "gold score: +0.100 ± 0.010: the gold judge" in Evaluation(found).verdict()


@pytest.mark.parametrize("missing", [*FULL, None])
def test_any_part_may_be_missing(missing):
    data = {key: value for key, value in FULL.items() if key != missing and missing is not None}
    assert Evaluation(data).markdown()
