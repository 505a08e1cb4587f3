"""Each rule on texts scored by hand."""

from __future__ import annotations

import time

import pytest
from pydantic import TypeAdapter, ValidationError

from rlhf_core.errors import DataError
from rlhf_core.jobs.rewards import (
    AnswerReward,
    ForbiddenWordsReward,
    LanguageReward,
    LengthPenaltyReward,
    LengthReward,
    ModelReward,
    MustEndReward,
    RegexReward,
    RepetitionReward,
    Reward,
    SentimentReward,
)
from rlhf_core.rewards import Rules
from rlhf_core.rewards.numbers import Number, Parts
from rlhf_core.rewards.spans import last_span
from rlhf_core.rewards.values import read
from tests.rlhf_core.rewards.helpers import score

LONG = "word " * 40_000


def test_length_falls_off_on_both_sides_of_the_target():
    rule = LengthReward(target=4, width=2)
    replies = ["a b c d", "a b", "a b c d e f", "a b c d e f g h", ""]
    assert score(rule, *replies) == pytest.approx([1.0, 0.5, 0.5, 0.2, 0.2])


def test_length_counts_words_of_any_script_or_characters():
    words = LengthReward(target=5, width=1)
    replies = ["你好世界。吗", "我用 Python 写", "it's a fine day, 2day 😀", "😀" * 5]
    assert score(words, *replies) == pytest.approx([1.0, 0.5, 1.0, 1 / 26])
    characters = LengthReward(target=5, width=1, unit="characters")
    assert score(characters, "你好世界。", "abcde ", "😀") == pytest.approx([1.0, 0.5, 1 / 17])


def test_length_still_tells_far_replies_apart():
    near, far = score(LengthReward(target=10, width=5), LONG, LONG * 2)
    assert near > far > 0


@pytest.mark.parametrize(
    ("unit", "replies"),
    [
        ("tokens", ["a b c", "a b c d", "a b c d e", "a b c d e f g", "a b c d e f g h i", ""]),
        ("words", ["a b c d", "a b c d e", "a, b c d. e f", "a b c d e f g h", "好" * 10, ""]),
        ("characters", ["abcd", "abc e", "abcdef", "😀" * 8, "x" * 10, ""]),
    ],
)
def test_length_penalty_falls_from_start_to_end(unit, replies):
    rule = LengthPenaltyReward(start=4, end=8, unit=unit)  # tokens: with the end of turn
    assert score(rule, *replies) == [0.0, -0.25, -0.5, -1.0, -1.0, 0.0]


def test_regex_searches_or_matches_the_whole():
    pattern = r"<b>\d+</b>"
    assert score(RegexReward(pattern=pattern), "x <b>12</b>", "<b></b>", "") == [1, 0, 0]
    whole = RegexReward(pattern=pattern, mode="fullmatch")
    assert score(whole, "x <b>12</b>", "<b>12</b>", "<b>12</b>\n") == [0, 1, 0]
    assert score(RegexReward(pattern="YES"), "yes") == [0]
    assert score(RegexReward(pattern="YES", ignore_case=True), "yes") == [1]
    assert score(RegexReward(pattern=r"\p{Han}{2}|😀"), "你好", "😀", "ok") == [1, 1, 0]


def test_regex_that_never_ends_is_no_match_and_counted():
    rules = Rules([RegexReward(pattern=r"(a|a?b?|aa)+$|(a*)*c", mode="fullmatch")], seed=0)
    started = time.monotonic()
    assert rules.score([[]], ["a" * 5000 + "!"], [{}], [True]) == [[0.0]]
    assert time.monotonic() - started < 30
    assert rules.failures == {"regex_timeout": 1}


def test_must_end_wants_an_ending_and_the_end_of_turn():
    rule = MustEndReward(endings=(".", "。", "</answer>"))
    assert score(rule, "Yes.", "好。\n", "<answer>1</answer> ", "No", "") == [1, 1, 1, 0, 0]
    assert score(rule, "Yes.", finished=False) == [0]
    assert score(MustEndReward(), "No", "") == [1, 1]
    assert score(MustEndReward(), "No", finished=False) == [0]
    anyhow = MustEndReward(endings=("!",), end_of_turn=False)
    assert score(anyhow, "Oh!", "Oh", finished=False) == [1, 0]


def test_forbidden_words_are_whole_words_in_any_case():
    rule = ForbiddenWordsReward(words=("ass", "as an AI", "c++", "笨蛋", "😡", "straße"))
    allowed = ["", "A class passes.", "as an air", "c+", "笨 蛋", "😀", LONG]
    assert score(rule, *allowed) == [1] * len(allowed)
    found = [
        "Ass!",
        "x As  an\nai",
        "C++11",
        "你这个笨蛋吗",
        "no😡",
        "STRASSE",
        "我ass你",
        "ａｓｓ",
    ]
    assert score(rule, *found) == [0] * len(found)


def test_repetition_is_the_share_of_new_n_grams():
    rule = RepetitionReward(n=2)
    # a b, b a, a b, b a, a b: two of five are new
    assert score(rule, "a b a b a b") == [pytest.approx(0.4)]
    assert score(rule, "a b c", "a", "", "The the the") == [1.0, 1.0, 1.0, 0.5]
    assert score(rule, "好的好的好") == [0.5]  # 好的, 的好, 好的, 的好
    assert score(rule, LONG) == [pytest.approx(1 / 39_999)]


def test_language_is_the_share_of_words_in_its_script():
    english, chinese = LanguageReward(language="english"), LanguageReward(language="chinese")
    replies = ["Good day", "你好", "我用Python 3", "", "42 😀!", "très bien", "привет мир", "かな"]
    assert score(english, *replies) == pytest.approx([1, 0, 1 / 3, 0, 0, 1, 0, 0])
    assert score(chinese, *replies) == pytest.approx([0, 1, 2 / 3, 0, 0, 0, 0, 0])


def test_exact_answer_ignores_case_space_and_outer_punctuation():
    rule = AnswerReward()
    same = ["Paris", " paris. ", '"PARIS"', "**Paris**", "Ｐａｒｉｓ！"]
    assert score(rule, *same, answer="Paris") == [1] * 5
    assert score(rule, "", "Paris, France", "Pari", LONG, answer="Paris") == [0] * 4
    assert score(rule, "北京。", "「北京」", "东京", answer="北京") == [1, 1, 0]
    assert score(rule, ".5", "5", answer=".5") == [1, 0]
    assert score(rule, "-5", "5", answer="-5") == [1, 0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("It is 42.", 42), ("first 1, then 2", 2), ("1,234,567.5 km", 1234567.5), ("-3", -3),
        ("x = -3", -3), ("3/4", 0.75), ("1 1/2 cups", 1.5), ("1e-3", 0.001),
        (r"\boxed{\frac{3}{4}}", 0.75), (r"-\frac{1}{2}", -0.5), (r"1\frac{1}{2}", 1.5),
        (".5", 0.5), ("$1,000", 1000), ("-$5", -5), ("４２", 42), ("\u22127", -7),
        ("答案是12。", 12),
        ("7-3", (7, 3)), ("1,2", (1, 2)), ("1234,5678", (1234, 5678)), ("12,345,67", (12345, 67)),
        ("1/0", None), ("none", None), ("", None), ("9" * 400, None), ("1e999", None), ("😀", None),
    ],
)  # fmt: skip
def test_last_number_is_read_with_what_belongs_to_it(text, value):
    found = read(last_span(text) or [])
    if isinstance(found, Parts):
        assert tuple(item.value for item in found.items) == value
    else:
        assert (found.value if isinstance(found, Number) else None) == pytest.approx(value)


def test_numeric_answer_compares_the_last_numbers():
    rule = AnswerReward(match="numeric")
    replies = ["6 times 7 is 42", "It is 42.0.", "84/2", "41", "", "forty-two", "四十二"]
    assert score(rule, *replies, answer="42") == [1, 1, 1, 0, 0, 0, 0]
    assert score(rule, "50%", "0.5", "50", "1/2", "50.1 %", answer="50%") == [1, 1, 1, 1, 0]
    assert score(rule, "50%", "0.5%", answer="0.5") == [1, 1]  # 0.5% may mean either
    assert score(rule, "0.5%", answer="50%") == [0]
    assert score(rule, "3.14", "3.1", answer="3.14159") == [0, 0]
    loose = AnswerReward(match="numeric", tolerance=0.01)
    assert score(loose, "3.14", "3.1", answer="3.14159") == [1, 0]


def test_numbers_in_very_long_replies_take_no_long_time():
    started = time.monotonic()
    rule = AnswerReward(match="numeric")
    replies = ["1" * 200_000, "1," * 100_000, "1 " * 100_000, "1" + " " * 200_000, "1,111" * 40_000]
    assert score(rule, *replies, answer="42") == [0] * 5
    assert time.monotonic() - started < 60


def test_answer_pattern_takes_the_last_match_of_reply_and_answer():
    rule = AnswerReward(match="numeric", pattern=r"####\s*(.*)")
    solution = "2 + 2 = 4, and 38 more\n#### 42"
    assert score(rule, "#### 41\n#### 42 apples", "42", "#### 41", answer=solution) == [1, 0, 0]
    either = AnswerReward(pattern=r"<answer>(.*?)</answer>|Answer: (\w+)")
    assert score(either, "Answer: yes", "<answer>Yes</answer>", "yes", answer="yes") == [1, 1, 0]
    boxed = AnswerReward(pattern=r"\\boxed(\{(?:[^{}]++|(?1))*+\})")
    assert score(boxed, r"so \boxed{\frac{1}{2}}", r"\boxed{2}", answer=r"\frac{1}{2}") == [1, 0]


def test_a_row_without_an_answer_is_an_error_or_a_set_score():
    for rule, row in [
        (AnswerReward(), {}),
        (AnswerReward(), {"answer": " "}),
        (AnswerReward(match="numeric"), {"answer": "Paris"}),
    ]:
        with pytest.raises(DataError, match=r"row 7 has .*data\.prompts\.columns"):
            score(rule, "Paris", **row)
        kinder = rule.model_copy(update={"without_answer": 0.25})
        assert score(kinder, "Paris", **row) == [0.25]


def test_sentiment_is_vaders_compound_score():
    good, bad, nothing, chinese = score(
        SentimentReward(), "I love this, it is great!", "I hate this.", "", "我爱你"
    )
    assert good > 0.8 and bad < -0.4 and nothing == 0 and chinese == 0
    [long] = score(SentimentReward(), "good 😀 " * 400)
    assert long == pytest.approx(1, abs=1e-2)


def test_names_and_weights_are_those_of_the_rules():
    rewards = [
        ModelReward(), SentimentReward(weight=0.5), RegexReward(pattern="a", weight=-1),
        RegexReward(pattern="b"), RegexReward(pattern="c"),
    ]  # fmt: skip
    rules = Rules(rewards, seed=0)
    assert rules.names == ["sentiment", "regex", "regex-2", "regex-3"]
    assert rules.weights == [0.5, -1.0, 1.0, 1.0]
    scores = rules.score([[], []], ["a", "bc"], [{}, {}], [True, True])
    assert scores[1:] == [[1, 0], [0, 1], [0, 1]]  # without the weights
    assert Rules([ModelReward()], seed=0).score([[]], ["a"], [{}], [True]) == []
    assert Rules(rewards, seed=0).score([], [], [], []) == [[], [], [], []]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"type": "regex", "pattern": "(a"}, r"'\(a' is not a regular expression"),
        ({"type": "answer", "pattern": "[z-a]"}, "is not a regular expression"),
        ({"type": "forbidden_words", "words": []}, "words is empty"),
        ({"type": "forbidden_words", "words": ["a", " "]}, "words holds an empty text"),
        ({"type": "must_end", "end_of_turn": False}, "every reply would get 1"),
        ({"type": "must_end", "endings": [""]}, "with which every reply ends"),
        ({"type": "length", "target": 5, "width": 0}, "greater than 0"),
        ({"type": "length_penalty", "start": 9, "end": 9}, "end is 9 and start 9; expected a gre"),
        ({"type": "python", "function": "my_rewards.brevity"}, "use package.module:function"),
        ({"type": "python", "function": "os:system('x')"}, "use package.module:function"),
    ],
)
def test_settings_that_make_no_sense_are_refused(value, message):
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(Reward).validate_python(value)


def test_settings_are_told_apart_by_type_and_survive_json():
    kinds = TypeAdapter(list[Reward])
    values = [
        {"type": "model"}, {"type": "length", "target": 5, "width": 2}, {"type": "sentiment"},
        {"type": "must_end", "endings": ["."]}, {"type": "repetition"},
    ]  # fmt: skip
    rewards = kinds.validate_python(values)
    assert [type(reward) for reward in rewards] == [
        ModelReward, LengthReward, SentimentReward, MustEndReward, RepetitionReward,
    ]  # fmt: skip
    assert kinds.validate_json(kinds.dump_json(rewards)) == rewards
