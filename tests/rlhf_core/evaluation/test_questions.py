"""The general questions and their marking, against verdicts by hand."""

import pytest

from rlhf_core.evaluation.questions import Question, is_right, mark, questions

CAPITAL = Question("What is the capital of France?", ("Paris",))
DAYS = Question("How many days are in a week?", ("7",))
COLOUR = Question("What colour is grass?", ("green",))
ICE = Question("What is frozen water called?", ("ice",))


@pytest.mark.parametrize(
    ("question", "reply"),
    [
        (CAPITAL, "Paris"),
        (CAPITAL, "The capital of France is PARIS."),
        (CAPITAL, "It's not Lyon, it is Paris!"),
        (CAPITAL, "It isn't hard: Paris"),
        (CAPITAL, "Not only Lyon is large; Paris is."),
        (DAYS, "There are seven days."),
        (DAYS, "7."),
        (DAYS, "A week has 7, I think."),
        (COLOUR, "Green!"),
    ],
)
def test_a_reply_with_the_answer_is_right(question, reply):
    assert is_right(question, reply)


@pytest.mark.parametrize(
    ("question", "reply"),
    [
        (CAPITAL, ""),
        (CAPITAL, "I love a good story."),
        (CAPITAL, "Parisian food is great."),
        (CAPITAL, "Not Paris."),
        (CAPITAL, "It isn't in Paris"),
        (CAPITAL, "Paris is not the capital."),
        (CAPITAL, "Paris isn’t it."),
        (DAYS, "70 days"),
        (DAYS, "7.5 days"),
        (DAYS, "3.7 days"),
        (DAYS, "It has 7,000 days."),
        (COLOUR, "Red or green."),
        (COLOUR, "green, or red"),
        (ICE, "That is nice."),
    ],
)
def test_a_reply_without_denying_or_hiding_the_answer_is_wrong(question, reply):
    assert not is_right(question, reply)


def test_a_denial_of_one_mention_leaves_another():
    assert is_right(CAPITAL, "Not Paris? Of course Paris.")


def test_the_set_has_forty_different_questions_that_do_not_hold_their_answer():
    asked = questions()
    assert len({q.prompt for q in asked}) == len(asked) == 40
    assert [q.prompt for q in asked if is_right(q, q.prompt)] == []
    assert all(is_right(q, f"It is {answer}.") for q in asked for answer in q.answers)


def test_the_mark_is_a_rate_with_its_interval():
    asked = [CAPITAL, DAYS, COLOUR, ICE]
    found = mark(asked, ["Paris.", "seven", "red", "nice"])
    assert (found["right"], found["n"], found["rate"]) == (2, 4, 0.5)
    # Wilson: (0.5 + z²/8 ± z sqrt(1/16 + z²/64)) / (1 + z²/4) with z = 1.96
    assert (round(found["low"], 3), round(found["high"], 3)) == (0.15, 0.85)
