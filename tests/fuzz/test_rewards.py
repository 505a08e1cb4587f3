"""Rules on any text: one finite number for each reply, within the rule's range."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st

from rlhf_core.jobs.rewards import (
    AnswerReward,
    ForbiddenWordsReward,
    LanguageReward,
    LengthReward,
    MustEndReward,
    RegexReward,
    RepetitionReward,
    Reward,
    SentimentReward,
)
from rlhf_core.rewards import Rules
from tests.fuzz.cases import try_cases
from tests.fuzz.values import texts

numbers = st.text("0123456789,./% -+eE$\\{}frac", max_size=20)
replies = st.one_of(texts, texts, numbers, st.text("ab 你好。😀!", max_size=30))
finite = st.floats(0, 1e9)
words = st.lists(texts.filter(str.strip).filter(lambda t: t.isprintable()), min_size=1, max_size=3)
PATTERNS = [r"(\d+)", r"####\s*(.*)", "(a+)+$", r"(?:x)|(b)", "", ".*", r"\p{Han}"]


def rules() -> st.SearchStrategy[Reward]:
    patterns = st.sampled_from(PATTERNS)
    return st.one_of(
        st.builds(
            LengthReward, target=finite, width=st.floats(1e-300, 1e9),
            unit=st.sampled_from(["words", "characters"]),
        ),
        st.builds(RegexReward, pattern=patterns, mode=st.sampled_from(["search", "fullmatch"])),
        st.builds(MustEndReward, endings=st.just(("。", "!", "a"))),
        st.builds(ForbiddenWordsReward, words=words.map(tuple)),
        st.builds(RepetitionReward, n=st.integers(1, 4)),
        st.builds(LanguageReward, language=st.sampled_from(["english", "chinese"])),
        st.builds(
            AnswerReward, match=st.sampled_from(["exact", "numeric"]),
            pattern=st.none() | patterns, tolerance=st.floats(0, 0.9), without_answer=st.just(0.5),
        ),
        st.just(SentimentReward()),
    )  # fmt: skip


def test_every_rule_gives_a_finite_number_for_any_text() -> None:
    scorers: dict[str, Rules] = {}  # the lexicon is read once

    def check(case: tuple[Reward, list[str], str]) -> None:
        rule, said, answer = case
        key = repr(rule)
        made = scorers.get(key) or scorers.setdefault(key, Rules([rule], 0))
        count = len(said)
        rows: list[dict[str, Any]] = [{"answer": answer, "extra": "", "row": 1}] * count
        done = [number % 2 == 0 for number in range(count)]
        [scores] = made.score([[]] * count, said, rows, done)
        least = -1.0 if isinstance(rule, SentimentReward) else 0.0
        assert len(scores) == count
        assert all(type(s) is float and math.isfinite(s) and least <= s <= 1 for s in scores)
        if isinstance(rule, AnswerReward) and rule.pattern is None and rule.match == "exact":
            assert made.score([[]], [answer], rows[:1] or [{"answer": answer}], [True]) in (
                [[1.0]], [[0.5]],
            )  # fmt: skip

    cases = st.tuples(rules(), st.lists(replies, min_size=1, max_size=3), replies)
    try_cases("rewards", cases, check)
