"""What replies cost beside their score: self-BLEU, refusals, languages, intervals, length."""

import itertools
import math

import numpy as np
import pytest

from rlhf_core.evaluation.behaviour import REFUSALS, changes_language, refuses, script
from rlhf_core.evaluation.intervals import RESAMPLES, difference, resampled_counts
from rlhf_core.evaluation.length_control import controlled_win_rate
from rlhf_core.evaluation.self_bleu import self_bleu

CATS = [
    "the cat sat on the mat today", "the cat sat on the mat",
    "a dog sat on the mat and the cat sat on a dog", "so do i",
    "the the the the the cat sat on",
]  # fmt: skip


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (CATS, 0.5218650165586726),  # of sacrebleu 2.6.0, corpus_bleu with all other replies as
        (["a b c d e", "b c d e f g h i"], 0.4543741956108465),  # references, not smoothed
        (["a b c d", "a b c d e f g h i j", "a b c d e f g h i k"], 0.6962860729713914),
        (["A b, c d!", "a b c d"], 1.0),
        (["a b c d", "e f g h"], 0.0),
        (["one reply of some words"], 0.0),
        (["", ""], 0.0),
    ],
)
def test_self_bleu_is_that_of_sacrebleu(texts, expected):
    assert self_bleu(texts) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("reply", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("As an AI language model, I have no feelings.", True),
        ("I’m unable to answer.", True),
        ("I'm sorry, but as a text-based AI, I don't have", True),  # of SmolLM2
        ("很抱歉，我无法提供这些信息。", True),
        ("Es tut mir leid, aber ich kann das nicht.", True),
        ("I can't wait to see you!", False),
        ("I am sorry for your loss.", False),
        ("The answer is 4." + " x" * 200 + " I cannot help", False),
        ("", False),
    ],
)
def test_refusals_are_found_by_their_phrases(reply, refused):
    assert refuses(reply) == refused


def test_phrases_of_refusals_are_written_as_they_are_looked_for():
    for phrase in itertools.chain.from_iterable(REFUSALS.values()):
        assert phrase == phrase.lower() and "’" not in phrase
        assert refuses(phrase.capitalize())


@pytest.mark.parametrize(
    ("text", "name"),
    [("Hello, 世界 and all", "LATIN"), ("你好，我是 GPT", "CJK"), ("猫が好きです", "KANA"),
     ("кот", "CYRILLIC"), ("안녕 world 친구", "HANGUL"),
     ("Ｈｅｌｌｏ", "LATIN"), ("1, 2, 3!", None)],
)  # fmt: skip
def test_script_is_that_of_most_words(text, name):
    assert script(text) == name


def test_language_changes_with_the_script_only():
    assert changes_language("How are you?", "我很好")
    assert changes_language("你好吗？", "I am fine.")
    assert not changes_language("How are you?", "Je vais bien.")  # as documented
    assert not changes_language("How are you?", "...")


def test_bootstrap_has_the_moments_of_resampled_rows():
    values = [0.0, 1.0, 3.0, 4.0, 9.0]
    means = resampled_counts(5, 3) @ np.array(values) / 5
    assert len(means) == RESAMPLES
    # of n rows with replacement: mean 3.4, variance of a mean sum((x - 3.4)²) / 25 = 1.968
    assert means.mean() == pytest.approx(3.4, abs=4 * math.sqrt(1.968 / RESAMPLES))
    assert means.var() == pytest.approx(1.968, rel=0.1)


def test_paired_interval_leaves_out_what_a_prompt_does_to_both():
    theirs = [float(10 * i) for i in range(40)]
    ours = [value + 1 + (-1) ** i * 0.5 for i, value in enumerate(theirs)]
    found = difference(ours, theirs, 0)
    assert found["mean"] == pytest.approx(1.0) and found["n"] == 40
    # the differences are 1.5 and 0.5: a normal interval is 1 ± 1.96 * 0.5 / sqrt(40)
    half = 1.96 * 0.5 / math.sqrt(40)
    assert found["low"] == pytest.approx(1 - half, abs=0.03)
    assert found["high"] == pytest.approx(1 + half, abs=0.03)
    assert (resampled_counts(40, 0) == resampled_counts.__wrapped__(40, 0)).all(), "seeded"
    assert (resampled_counts(40, 0) != resampled_counts(40, 1)).any()


def test_many_rows_are_drawn_in_units_with_the_same_interval():
    ours = np.random.default_rng(0).normal(1.0, 2.0, 200_000)  # row by row: 3 GB
    found = difference(ours, np.zeros_like(ours), 0)
    half = 1.96 * 2.0 / math.sqrt(len(ours))
    assert found["n"] == len(ours) and found["mean"] == pytest.approx(ours.mean())
    assert found["low"] == pytest.approx(found["mean"] - half, abs=0.1 * half)
    assert found["high"] == pytest.approx(found["mean"] + half, abs=0.1 * half)


def test_weighted_difference_is_that_of_two_ratios():
    found = difference([2.0, 4.0], [3.0, 9.0], 0, ([1.0, 2.0], [1.0, 3.0]))
    assert found["mean"] == pytest.approx(6 / 3 - 12 / 4)


WINS = [1, 1, 0, 1, 0, 1, 1, 0, 1, 1, 0, 1]
OURS = [40, 35, 20, 60, 22, 30, 48, 25, 33, 51, 30, 28]
THEIRS = [30, 33, 25, 40, 30, 31, 30, 30, 30, 30, 18, 26]


def test_length_controlled_win_rate_is_that_of_scikit_learn():
    found = controlled_win_rate(WINS, OURS, THEIRS, 0)
    # scikit-learn 1.9.1: LogisticRegression(C=1.0) on tanh(gap / sd); rate = sigmoid(intercept)
    assert found["rate"] == pytest.approx(0.61142595, abs=1e-6)
    assert found["length"] == pytest.approx(1.01919949, abs=1e-6)
    assert found["low"] < found["rate"] < found["high"]


def test_length_controlled_win_rate_falls_when_length_has_won():
    longer = [float(a > b) for a, b in zip(OURS, THEIRS, strict=True)]
    raw = sum(longer) / len(longer)
    assert controlled_win_rate(longer, OURS, THEIRS, 0)["rate"] < raw - 0.05
    same = controlled_win_rate(WINS, OURS, OURS, 0)
    assert same["rate"] == pytest.approx(8 / 12) and same["length"] == pytest.approx(0.0)


def test_length_controlled_win_rate_of_ties_and_of_victories():
    assert controlled_win_rate([0.5] * 12, OURS, THEIRS, 0)["rate"] == pytest.approx(0.5)
    won = controlled_win_rate([1.0] * 12, OURS, THEIRS, 0)
    assert won["rate"] == pytest.approx(1.0, abs=1e-4) and won["low"] > 0.99
