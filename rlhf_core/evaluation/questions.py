"""Forty short general questions with accepted answers: what a model knew, and may have lost.

Alignment can cost knowledge that no reward sees. The questions ask for one fact each, of the kind
that models of 100 million parameters begin to know. They are written for this project.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlhf_core.jobs.results import GeneralQuestion

# How a word before the answer takes it back: "not Paris", "isn't in Paris", "never Paris".
DENIAL = re.compile(r"\b(?:not|no|never|cannot|\w+n['’]t)(?:\s+(?:in|on|at|a|an|the|really))*\s*$")
# How the words after it do: "Paris is not the capital", "Paris isn't".
TAKEN_BACK = re.compile(r"\s+(?:(?:is|are|was|has|have|does|do)\s+not\b|\w+n['’]t\b)")
CHOICE = re.compile(r"\s*,?\s*\b(?:or|nor)\b")  # "red or green": no answer
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve",
)  # fmt: skip


def questions() -> tuple[GeneralQuestion, ...]:
    """The set, always in this order."""
    return tuple(GeneralQuestion(question=text, answers=answers) for text, *answers in _QUESTIONS)


def is_right(question: GeneralQuestion, reply: str) -> bool:
    """Whether the reply gives an accepted answer.

    An answer counts as whole words in any case, a number as digits or as a word. It does not count
    where the reply denies it ("not Paris") or leaves it open ("red or green"). A reply that gives
    a wrong answer beside the right one counts: what is wrong is not known.
    """
    text = reply.lower()
    for answer in _spellings(question.answers):
        for found in re.finditer(rf"(?<!\w){re.escape(answer)}(?!\w)(?![.,]\d)", text):
            before, after = text[: found.start()], text[found.end() :]
            if not (
                re.search(r"\d[.,]$", before)  # 12 in 3.12
                or DENIAL.search(before)
                or TAKEN_BACK.match(after)
                or CHOICE.match(after)
                or re.search(r"\bor\s+(?:an?\s+|the\s+)?$", before)
            ):
                return True
    return False


def _spellings(answers: Sequence[str]) -> list[str]:
    """The answers in lower case, with each number's word."""
    words = [NUMBERS[int(a)] for a in answers if a.isdecimal() and int(a) < len(NUMBERS)]
    return [*(answer.lower() for answer in answers), *words]


_QUESTIONS = (
    ("What is the capital of France?", "Paris"),
    ("What is the capital of Italy?", "Rome"),
    ("What is the capital of Japan?", "Tokyo"),
    ("What is the capital of England?", "London"),
    ("What is the capital of Germany?", "Berlin"),
    ("What is the capital of the United States?", "Washington"),
    ("On which continent is Egypt?", "Africa"),
    ("In which country is the Great Wall?", "China"),
    ("Which language do people speak in Brazil?", "Portuguese"),
    ("What is the largest ocean on Earth?", "Pacific"),
    ("Which planet do we live on?", "Earth"),
    ("Which star is closest to the Earth?", "Sun"),
    ("What goes around the Earth and shines at night?", "Moon"),
    ("What colour is grass?", "green"),
    ("What colour is the sky on a clear day?", "blue"),
    ("What colour is a ripe banana?", "yellow"),
    ("What colour is snow?", "white"),
    ("What colour is blood?", "red"),
    ("What is the opposite of hot?", "cold"),
    ("What is the opposite of big?", "small", "little", "tiny"),
    ("What is the opposite of up?", "down"),
    ("What is the opposite of day?", "night"),
    ("How many days are in a week?", "7"),
    ("How many months are in a year?", "12"),
    ("How many hours are in a day?", "24", "twenty-four", "twenty four"),
    ("How many legs does a dog have?", "4"),
    ("How many legs does a spider have?", "8"),
    ("How many sides does a triangle have?", "3"),
    ("What is two plus two?", "4"),
    ("What day comes after Monday?", "Tuesday"),
    ("What month comes after March?", "April"),
    ("Which season comes after winter?", "spring"),
    ("Which animal says meow?", "cat", "cats", "kitten"),
    ("Which animal barks?", "dog", "dogs"),
    ("What do bees make?", "honey"),
    ("What do cows give us to drink?", "milk"),
    ("What is frozen water called?", "ice"),
    ("At what temperature in Celsius does water boil?", "100", "hundred"),
    ("Who wrote Romeo and Juliet?", "Shakespeare"),
    ("What do we breathe to stay alive?", "air", "oxygen"),
)
