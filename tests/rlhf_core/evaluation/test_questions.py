"""The general questions and their marking, against verdicts by hand."""

import pytest

from rlhf_core.evaluation.questions import is_right, questions
from rlhf_core.jobs.results import GeneralQuestion

CAPITAL = GeneralQuestion(question="What is the capital of France?", answers=("Paris",))
DAYS = GeneralQuestion(question="How many days are in a week?", answers=("7",))
COLOUR = GeneralQuestion(question="What colour is grass?", answers=("green",))
ICE = GeneralQuestion(question="What is frozen water called?", answers=("ice",))


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
    assert len({q.question for q in asked}) == len(asked) == 40
    assert [q.question for q in asked if is_right(q, q.question)] == []
    assert all(is_right(q, f"It is {answer}.") for q in asked for answer in q.answers)
