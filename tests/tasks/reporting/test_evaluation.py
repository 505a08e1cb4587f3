"""The evaluation's tables and its verdict."""

import json
from pathlib import Path

import pytest

from rlhf_core.pipeline.presets import build_config
from tasks.reporting.evaluation import Evaluation, gold_labeller

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
        ((0, 1), (0, 1), "Verdict: better. PPO over SFT: reward +1.000 ± 0.141, gold score +1"),
        ((0, 1), (0, -1), "Verdict: **reward hacked**. "),
        ((0, 1), (0, 0.1), "Verdict: not shown. "),
        ((0, 0.1), (0, 0.1), "did not rise by more than two standard errors"),
        ((0, 0.1), (0, 1), "Verdict: better. "),
        ((1, 0), (1, 0), "Verdict: **worse**. "),
        ((0, 1), None, "nobody knows whether replies improved"),
    ],
)
def test_verdict_says_whether_gold_and_proxy_agree(reward, gold, text):
    assert text in evaluation(reward, gold).verdict()


def test_paired_gain_is_preferred_for_the_verdict():
    found = {**evaluation((0, 1), (0, 0.1)).data, "gold_gain": {"mean": 0.1, "se": 0.01}}
    assert "gold score +0.100 ± 0.010. The gold judge" in Evaluation(found).verdict()


def priced(start, policy, heldout=None):
    """The reward and the gold score rose by 1; further numbers of SFT and of the final model."""
    data = evaluation((0, 1), (0, 1)).data
    data["models"]["sft"] |= start
    data["models"]["policy"] |= policy
    return Evaluation({**data, "heldout": heldout or {}}).verdict()


def test_a_gain_with_a_price_names_it():
    text = priced({"distinct_2": 0.8}, {"distinct_2": 0.71})
    assert "Verdict: better at a price. " in text
    assert "The price: distinct-2 fell from 0.80 to 0.71." in text
    text = priced({}, {}, {"sft": {"loss": 3.0}, "policy": {"loss": 3.2}})
    assert "better at a price" in text
    assert "held-out loss rose from 3.00 to 3.20" in text
    assert "Verdict: better. " in priced({"distinct_2": 0.8}, {"distinct_2": 0.73})


def test_replies_that_became_one_reply_are_a_hacked_reward_whatever_the_judge_says():
    text = priced(
        {"top_opening": 0.1, "distinct_2": 0.8},
        {"top_opening": 0.6, "opening": "i love a", "distinct_2": 0.6},
    )
    assert "Verdict: **reward hacked**. " in text
    assert '60% of the replies begin with "i love a" (SFT: 10% begin alike)' in text
    assert "reward hacked" in priced({"distinct_2": 0.8}, {"distinct_2": 0.39})


def test_a_judge_that_labelled_the_pairs_shows_nothing():
    found = Evaluation(evaluation((0, 1), (0, 1)).data, labelled_by="vader").verdict()
    assert "Verdict: not shown. " in found
    assert "vader also labelled the reward model's pairs" in found


def test_the_pipeline_knows_who_labelled_its_pairs():
    assert gold_labeller(build_config("demo")) == "vader"
    assert gold_labeller(build_config("demo", ["evaluate.judge=none"])) is None
    assert gold_labeller(build_config("grpo-rules", ["evaluate.judge=vader"])) is None


@pytest.mark.parametrize("missing", [*FULL, None])
def test_any_part_may_be_missing(missing):
    data = {key: value for key, value in FULL.items() if key != missing and missing is not None}
    assert Evaluation(data).markdown()
