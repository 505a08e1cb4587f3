"""The evaluation's table and sentences."""

import json
from pathlib import Path

import pytest

from tasks.reporting.evaluation import Evaluation
from tasks.reporting.judges import Judge

FULL = json.loads((Path(__file__).parents[1] / "stubs/rlhf_stub/evaluation.json").read_text())
JUDGES = {
    "reward": Judge("the reward model", False, "was trained in this run"),
    "gold": Judge("the gold judge vader", True, "had no part in the training"),
}


def test_table_has_a_column_per_model_and_what_changed():
    table = Evaluation(FULL).models().splitlines()
    assert table[0] == (
        "| mean ± standard error (128 held-out prompts) | base | SFT | PPO | PPO − SFT |"
    )
    assert table[2] == "| **What was gained** | | | | |"
    assert (
        "| reward | -0.210 ± 0.080 | 0.020 ± 0.090 | 1.310 ± 0.070 | +1.290 (+1.100 to +1.480) |"
        in (table)
    )
    cost = table[table.index("| **What it cost** | | | | |") :]
    assert "| held-out loss (nats per token) | 2.910 | 2.550 | – | – |" in cost
    assert "| finished replies | 71 % | 93 % | 90 % | -3 (-10 to +4) points |" in cost
    assert "sampled at temperature 1 with seed 0, at most 24 tokens" in table[-1]


def test_table_of_an_older_evaluation_has_no_differences():
    old = {name: value for name, value in FULL.items() if name not in ("differences", "sampling")}
    table = Evaluation(old).models().splitlines()
    assert table[0].endswith("| base | SFT | PPO |")
    assert "| reward | -0.210 ± 0.080 | 0.020 ± 0.090 | 1.310 ± 0.070 |" in table


def test_openings_are_named_without_what_would_break_the_table():
    found = {"models": {"policy": {"openings": [["i love a", 0.5], ["a|b *c*", 0.25], ["", 0.2]]}}}
    assert 'PPO: "i love a" 50%, "ab c" 25%.' in Evaluation(found).models()


def test_reward_model_stands_beside_its_baselines():
    table = Evaluation(FULL).reward_model()
    assert "| reward model | 78.0 | 70.0 to 84.0 |" in table
    assert "| longer reply wins | 55.0 |" in table
    assert "| bag of words | 71.0 |" in table
    assert "length" not in table.rpartition("|")[2], "results of older versions have none"
    first = {"reward_model": {**FULL["reward_model"], "length_correlation": -0.4, "members": 3}}
    table = Evaluation(FULL | first).reward_model()
    assert "| reward model 1 of 3 | 78.0 |" in table
    assert table.endswith("\n\nOver these pairs, score and length correlate with -0.40.")


def test_win_rates_are_given_with_their_interval_and_at_equal_length():
    text = Evaluation(FULL, judges=JUDGES).win_rates()
    assert "81 % (73 to 87 %) of 128 prompts for the reward model, on 74 % " in text
    assert "for the gold judge vader (70 % (60 to 78 %) if all replies were equally long)." in text
    assert "- The reward model is not independent: it was trained in this run." in text
    assert "- The gold judge vader is independent: it had no part in the training." in text


@pytest.mark.parametrize("missing", [*FULL, None])
def test_any_part_may_be_missing(missing):
    data = {key: value for key, value in FULL.items() if key != missing and missing is not None}
    assert Evaluation(data, judges=JUDGES).markdown()
