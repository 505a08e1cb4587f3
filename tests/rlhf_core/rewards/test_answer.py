"""Answers read as values: a table of pairs with hand-set verdicts."""

from __future__ import annotations

import time
from collections import Counter

import pytest

from rlhf_core.jobs.rewards import AnswerReward
from rlhf_core.rewards import Rules
from rlhf_core.rewards.answer import Verdict, exact_match, has_number, numeric_match

EQUAL = [
    ("1{,}234", "1234"),
    (r"10,\!000", "10000"),
    (r"10\,000", "10,000"),
    ("10 000", "10000"),
    (r"2 \times 10^{5}", "200000"),
    ("2×10⁵", "2e5"),
    (r"2\cdot10^5", "200,000"),
    ("12:30", "12:30"),
    ("1:30 pm", "1:30 p.m."),
    ("[0,1)", "[0, 1)"),
    (r"\left[0,1\right)", "[0,1)"),
    ("5!", "5!"),
    (r"\frac{3}{4}", "0.75"),
    (r"\dfrac34", "3/4"),
    (r"1\frac{1}{2}", "1.5"),
    ("1 1/2 cups", "1.5"),
    ("1½", "1.5"),
    ("½", "0.5"),
    ("50%", "0.5"),
    (r"50\%", "50"),
    (r"$\frac{1}{2}$", "0.5"),
    ("5 km", "5000 m"),
    ("5 apples", "5"),
    (r"5\text{ cm}", "5 cm"),
    ("5 cm²", r"5\text{ cm}^2"),
    (r"90^\circ", "90"),
    ("90°", "90 degrees"),
    ("{1,2}", r"\{2, 1\}"),
    ("$5", "5 dollars"),
    ("$5", "5"),
    ("3 million", "3,000,000"),
    ("0 < x ≤ 5", "(0,5]"),
    ("x > 5", "5 < x"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}"),
    ("x = 5", "5"),
    ("The answer is 42.", "42"),
    ("**42**", "42"),
    (r"\boxed{42}", "42"),
    ("7-3", "7-3"),
    ("(1, 2)", "(1,2)"),
    (r"(-\infty, 3]", "(-∞,3]"),
    (r"5 \pm 1", "5±1"),
    (r"2\sqrt{3}", r"2 \sqrt{3}"),
    ("1e-3", "0.001"),
    ("-5", "−5"),
    ("７", "7"),
    ("٤٢", "42"),
    ("84/2", "42"),
    ("first 1, then 2", "2"),
    ("答案是12。", "12"),
    ("-$5", "-5"),
    (r"-\frac{1}{2}", "-0.5"),
    ("1,234,567.5 km", "1234567.5"),
    ("the 3rd", "3"),
    ("5 million", "5000000"),
    ("-3", "x = -3"),
    ("2 or 3", "2, 3"),
    ("(1/2, 0.25)", r"(\frac12, 1/4)"),
    ("60 km/h", "60 km/h"),
    ("a 5-year plan", "5"),
    ("3:4", "3 : 4"),
    ("1010_2", "1010_{2}"),
    ("a number, 42", "42"),
    ("$42$", "42"),
    ("€5", "5 euros"),
    ("It costs $5 and then $7.", "7"),
    ("0", "0.0"),
    ("(5)", "5"),
    ("5.", "5"),
    ("5?", "5"),
    ("So 6*7 = 42", "42"),
    ("Answer: 42", "42"),
    ("12:30 pm", "12:30 PM"),
    ("- x = 3", "3"),
    ("3 pm", "3:00 pm"),
    ("15 min", "0.25 h"),
    ("The price is $1,000.", "1000"),
    ("(a) 5", "5"),
    ("'5'", "5"),
    ('"5"', "5"),
    ("5 (five)", "5"),
    ("Total: 5 (see above)", "5"),
    ("5 = x", "5"),
    ("Paris, 5", "5"),
    ("It took 3 hours", "3 h"),
    ("[1, 2, 3]", "[1,2,3]"),
    ("1,2,3", "1, 2, 3"),
    ("5\n", "5"),
    ("Step 1: 7\n2. 5", "5"),
    ("I have 5, you know", "5"),
    ("5,", "5"),
    ("5;", "5"),
    ("#### 5", "5"),
    ("#5", "5"),
    (r"\(5\)", "5"),
    (r"\[5\]", "5"),
    ("=5", "5"),
    ("= 5", "5"),
    ("≈5", "5"),
    ("+5", "5"),
    ("5 %", "5%"),
    ("[5 km", "5"),
    ("<answer>5</answer>", "5"),
    ("| 5 |", "5"),
    ("`5`", "5"),
    ("> 5", "x > 5"),
    (r"$\$5$", "5"),
    ("It is 5 - that is all", "5"),
    ("2 x 10^5", "200000"),
    ("17 R 3", "17 R 3"),
    ("2^{10}", "2^10"),
    (r"\$5", "5 dollars"),
]
DIFFERENT = [
    ("1{,}234", "5{,}234"),
    (r"10,\!000", r"20,\!000"),
    (r"10\,000", r"20\,000"),
    ("1 234", "5 234"),
    (r"2 \times 10^{5}", r"3 \times 10^{5}"),
    ("2×10⁵", "3×10⁵"),
    ("12:30", "13:30"),
    ("1:30 pm", "1:30 am"),
    ("3 pm", "3 am"),
    ("[0,1)", "(0,1]"),
    ("[0,1)", "[0,1]"),
    ("3:4", "1:4"),
    (r"\frac{3}{4}", r"\frac{1}{4}"),
    (r"1\frac{1}{2}", r"2\frac{1}{2}"),
    ("1½", "5.5"),
    ("5 km", "5 m"),
    ("5 kg", "5 m"),
    ("$5", "€5"),
    ("30°C", "30°F"),
    ("{1,2}", "{1,3}"),
    ("{1,2}", "(1,2)"),
    ("(1,2)", "(3,2)"),
    ("(1,2)", "2"),
    ("x > 5", "x < 5"),
    ("x > 5", "5"),
    ("x ≥ 5", "x > 5"),
    (r"5 \pm 1", r"6 \pm 1"),
    (r"5 \pm 1", "1"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}0&0\\0&4\end{pmatrix}"),
    (r"\begin{pmatrix}1\\4\end{pmatrix}", "4"),
    ("5 million", "5 thousand"),
    ("2024-01-05", "1999-12-05"),
    ("3-5", "1-5"),
    ("7-3", "3"),
    ("-5", "5"),
    ("41", "42"),
    ("(-∞,3]", "(-∞,3)"),
    ("5 cm^2", "5 cm^3"),
    ("60 km/h", "60 m/s"),
    ("[0,1] ∪ [2,3]", "[0,1] ∪ [2,4]"),
    ("0 < x < 1", "0 < x ≤ 1"),
    ("50%", "5"),
    ("", "5"),
    ("none", "5"),
    ("(0;1)", "1"),
    ("forty-two", "42"),
    (r"\frac{1}{23}", r"\frac{12}{3}"),
    ("5 ms", "5 m"),
]
EQUAL += [
    (r"\boxed{(7.765, 7.882)}", "(7.765,7.882)"),
    (r"\boxed{x^2 + 1}", "x^2+1"),
    (r"\boxed{2, 3}", "2,3"),
    ("{(1,2)}", "(1, 2)"),
    ("0x1f", "31"),
]
DIFFERENT += [("0x1f", "0x2f"), (r"\boxed{03:22:03}", "03:22:04")]
UNREADABLE = [
    ("12abc", "12abd"),
    ("abc12", "abd12"),
    ("x_{max}2", "y_{min}2"),
    ("log 5", "5"),
    ("7 mod 3", "3"),
    ("1/2/2024", "3/2/2024"),
    ("5!", "5"),
    ("5!", "120"),
    ("5!", "4!"),
    ("5²", "5"),
    ("5²", "52"),
    ("5²", "25"),
    ("2^{10}", "10"),
    ("2^{10}", "3^{10}"),
    (r"\sqrt{2}", "2"),
    (r"\sqrt{2}", r"3\sqrt{2}"),
    (r"2\pi", "2"),
    ("x^2", "2"),
    ("2x", "2"),
    ("12B", "12"),
    ("B12", "12"),
    ("v1.2.3", "3"),
    ("192.168.0.1", "192.168.1.1"),
    ("1,5", "5"),
    ("1,5", "1.5"),
    ("1.234,5", "5"),
    ("1'234", "234"),
    ("1010_2", "2"),
    ("2 + 3", "5"),
    ("2 + 3", "3"),
    ("10 - 3", "3"),
    ("6*7", "42"),
    ("6*7", "7"),
    ("2 or 5", "5"),
    ("1:30", "1:30 pm"),
    ("3:4", "3/4"),
    ("|-5|", "5"),
    (r"\log_2 8", "8"),
    (r"0.\overline{3}", "0.3"),
    ("0.333...", "0.333"),
    ("0.(3)", "3"),
    ("]0,1[", "]0,1]"),
    ("- 5", "5"),
    ("H2O", "2"),
    ("n! + 5", "5"),
    ("1/0", "0"),
    ("f(5)", "5"),
    ("5x + 1", "1"),
    ("[5]", "5"),
    ("12,345,67", "67"),
    ("5 + x", "5"),
    ("3 ± 1 ± 2", "2"),
    ("log(5)", "5"),
    ("e^5", "5"),
    ("i5", "5"),
    (r"5\alpha", "5"),
    ("5%!", "5"),
    ("1 2 3", "3"),
    ("5_3", "3"),
    ("17 R 3", "16 R 3"),
    ("17 R 3", "3"),
    ("5 cm x 3 cm", "3 cm"),
    ("H_{1}2", "H_{12}"),
]
# Words that change a number: none of these is shown to be 5.
QUALIFIED = """
at least 5|at most 5|no more than 5|not more than 5 km|no fewer than 5|more than 5|less than $5
greater than or equal to 5|up to 5|about 5|about $5|About 5|around 5|approximately 5|approx. 5
roughly 5|nearly 5|almost 5|close to 5|over 5|under 5|between 3 and 5|5 or more|5 or fewer
5 people or more|5 and above|5+|5 at least|5 at the most|5 or so|5-ish|5ish|~5|not 5
It is not equal to 5|never 5|except 5|5 squared|5 cubed|5 factorial|5 and a half|twice 5|double 5
half of 5|10% of 5|3 of 5|3 out of 5|square root of 5|8 plus 5|8 minus 5|8 times 5|10 divided by 5
8 by 5|3 to 5|3 to the 5|5 km to 5 km|8 over 5|8 per 5|to the power of 5|17 remainder 5
rather than 5|\\boxed{\\text{at least } 5}|The answer is at least 5.|至少5|大约 5|5以上|5左右|不到5
"""
QUALIFIED = [(text, "5") for line in QUALIFIED.split("\n") for text in line.split("|") if text]
UNREADABLE += [*QUALIFIED, ("at least 5", "at most 5"), ("at least 5", "at least 6")]
EQUAL += [
    ("minus 5", "-5"), ("negative 5", "-5"), ("负5", "-5"), ("plus 5", "5"),
    ("5 plus or minus 1", "5±1"), ("at least 5", "It is At  least 5."), ("5 or more", "5 OR more"),
    ("a total of 5", "5"), ("the sum of 5", "5"), ("The number of apples is 5", "5"),
    ("only 5", "5"),
    ("exactly 5", "5"), ("5 times", "5"), ("equal to 5", "5"), ("From 3 apples he goes to 5", "5"),
    ("I am not sure, but 5", "5"), ("I think about it: 5", "5"), ("more than enough: 5", "5"),
    ("x ≈ 5", "5"), ("Figure~5", "5"), ("What I have left over is 5", "5"),
    ("7 plus 5 is 12", "12"),
    ("20% of 50 = 10", "10"), ("at least 3, so 5", "5"), ("After 5 days", "5"),
]  # fmt: skip
DIFFERENT += [("minus 5", "5"), ("negative 5", "5"), ("负5", "5")]
LONG = [("9" * 400, "9" * 401), ("1" + "0" * 900 + "5", "5")]


@pytest.mark.parametrize(
    ("verdict", "pairs"),
    [
        (Verdict.EQUAL, EQUAL),
        (Verdict.DIFFERENT, DIFFERENT),
        (Verdict.UNREADABLE, UNREADABLE + LONG),
    ],
)
def test_pairs_have_the_verdict_of_the_table_in_both_directions(verdict, pairs):
    wrong = {
        (given[:40], wanted[:40]): found.value
        for one, other in pairs
        for given, wanted in ((one, other), (other, one))
        if (found := numeric_match(given, wanted, 1e-6)) is not verdict
    }
    assert wrong == {}


def test_text_is_equal_to_itself_wherever_it_has_a_number():
    texts = {text for pair in EQUAL + DIFFERENT + UNREADABLE for text in pair}
    assert all(numeric_match(t, t, 0.0) is Verdict.EQUAL for t in texts if has_number(t))
    boxed = {t for t in texts if has_number(t) and t.count("{") == t.count("}") and "$" not in t}
    verdicts = {t: numeric_match(rf"So \boxed{{{t}}}.", t, 0.0) for t in boxed}
    assert Verdict.DIFFERENT not in verdicts.values()


def test_answer_of_several_lines_or_equations_is_not_its_last_number():
    for answer, other in [("1 0\n0 1", "0 0\n0 1"), ("x=2, y=3", "x=5, y=3"), ("1\n5", "3\n5")]:
        assert numeric_match(answer, answer, 0.0) is Verdict.EQUAL
        assert numeric_match(other, answer, 0.0) is Verdict.UNREADABLE
    assert numeric_match("4", "2 + 2 = 4", 0.0) is Verdict.EQUAL
    assert numeric_match("42", "There are 6 rows of 7.\nThat is 42", 0.0) is Verdict.EQUAL
    assert not has_number("forty-two") and not has_number("")


def test_unreadable_replies_get_0_and_are_counted():
    rules = Rules([AnswerReward(match="numeric")], seed=0)
    replies = ["5", "5!", "2 + 3", "6", "no idea", "1,5"]
    scores = rules.score([[]] * 6, replies, [{"answer": "5"}] * 6, [True] * 6)
    assert scores == [[1, 0, 0, 0, 0, 0]]
    assert rules.failures == Counter(answer_unreadable=3)


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("[0,1)", "(0,1]", False), ("5!", "5", False), ("n!", "n", False), ("Yes!", "yes", True),
        ("5!", "5!.", True), ("{1,2}", "[1,2]", False), ("(B)", "b", True), ("B)", "B", True),
        ("f'", "f", False), ("5'", "5", False), ("'Paris'", "paris", True), ("5²", "52", False),
        ("½", "1/2", True), ("1½", "11/2", False), ("$5$", "5", True), ("]0,1[", "]0,1]", False),
        ("0.333...", "0.333", False), ("Paris...", "Paris", True), ("f(x)", "f x", False),
    ],
)  # fmt: skip
def test_exact_answer_keeps_marks_that_are_part_of_it(one, other, equal):
    assert exact_match(one, other) == exact_match(other, one) == equal


def test_deep_and_long_replies_take_no_long_time():
    started = time.monotonic()
    replies = [
        "(" * 100_000 + "5",
        "{5" * 9000,
        r"\frac{" * 9000 + "5",
        "$5" * 90_000,
        "½" * 99_999,
    ]
    assert all(numeric_match(reply, "42", 1e-6) is not Verdict.EQUAL for reply in replies)
    assert time.monotonic() - started < 20
