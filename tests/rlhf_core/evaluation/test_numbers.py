"""Pairs, baselines, judges and the evaluation's numbers, against hand values."""

import math

import pytest

from rlhf_core.errors import ConfigError
from rlhf_core.evaluation.baselines import bag_of_words_margins, length_margins
from rlhf_core.evaluation.scored import shown_prompt
from rlhf_core.evaluation.statistics import accuracy, rate, standard_error, wilson_interval, wins
from rlhf_core.judges.lexicon import get_judge
from rlhf_core.stages.label import compare


def test_every_two_replies_that_differ_become_a_pair():
    kept, too_close = compare([0.0, 0.9, 0.0, 0.5], 0.05, best_worst=False)
    assert set(kept) == {(1, 3), (1, 0), (1, 2), (3, 0), (3, 2)}
    assert too_close == 1  # the two zeros


def test_a_heldout_prompt_gives_its_best_and_worst_reply():
    assert compare([0.1, 0.9, -0.3], 0.05, best_worst=True) == ([(1, 2)], 0)
    assert compare([0.1, 0.12], 0.05, best_worst=True) == ([], 1)
    assert compare([0.0, 0.0], 0.0, best_worst=True) == ([], 1), "a tie has no better reply"


def test_wilson_interval_by_hand():
    # Newcombe (1998), table I: 81 of 263 and 0 of 20
    low, high = wilson_interval(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    low, high = wilson_interval(0, 20)
    assert (round(low, 4), round(high, 4)) == (0.0, 0.1611)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_accuracy_counts_a_tie_half():
    found = accuracy([1.0, -1.0, 0.0, 2.0])
    assert found["accuracy"] == 0.625
    assert found["n"] == 4


def test_length_baseline_takes_its_direction_from_training():
    heldout = [("ab", "abcd")]
    assert length_margins([("long one", "x")], heldout) == [-2.0]
    assert length_margins([("x", "long one")], heldout) == [2.0]


def test_bag_of_words_finds_the_word_that_decides():
    train = [(f"good thing {i}", f"bad thing {i}") for i in range(20)]
    heldout = [("a good day", "a bad day"), ("so bad", "so good")]
    first, second = bag_of_words_margins(train, heldout)
    assert first > 0 > second


def test_bag_of_words_penalty_keeps_the_weights_small():
    train = [("good", "bad")] * 4
    loose = bag_of_words_margins(train, [("good", "bad")], l2=0.1)[0]
    tight = bag_of_words_margins(train, [("good", "bad")], l2=10.0)[0]
    # stationary point of 4 softplus(-2w) + l2 w^2 with margin m = 2w: 4 sigmoid(-m) = l2 m / 2
    for margin, l2 in ((loose, 0.1), (tight, 10.0)):
        assert 4 / (1 + math.exp(margin)) == pytest.approx(l2 * margin / 2, rel=1e-3)


def test_judges_order_replies_and_unknown_ones_are_refused():
    for name in ("vader", "textblob"):
        judge = get_judge(name)
        assert judge("", "I love it, wonderful!") > 0.5 > 0 > judge("", "This is horrible.")
        assert judge("", "I am not happy.") < 0 == judge("", "The table has four legs.")
    # TextBlob averages over the words it knows: great 0.8, bad -0.7
    assert get_judge("textblob")("", "Great food, bad wine.") == pytest.approx(0.05)
    with pytest.raises(ConfigError, match="known: vader, textblob"):
        get_judge("nobody")


def test_win_rate_and_standard_error():
    found = rate(wins([1, 2, 3, 4], [0, 2, 5, 1]))
    assert (found["rate"], found["n"]) == (0.625, 4)
    assert standard_error([1.0, 2.0, 3.0, 4.0]) == pytest.approx(math.sqrt(5 / 3) / 2)
    assert standard_error([1.0]) == 0.0


def test_prompt_text_shows_a_talk_with_its_roles():
    one = '[{"role":"system","content":"s"},{"role":"user","content":"hi"}]'
    talk = (
        '[{"role":"user","content":"a"},{"role":"assistant","content":"b"},'
        '{"role":"user","content":"c"}]'
    )
    assert shown_prompt(one) == "hi"
    assert shown_prompt(talk) == "user: a\nassistant: b\nuser: c"
