"""Reads the reference answers as the rule `answer` does, before anything is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rlhf_core.jobs.rewards import AnswerReward
from rlhf_core.rewards.answer import has_number, is_readable
from rlhf_core.rewards.patterns import compile_pattern, extract

MOST_EXAMPLES = 3


def expected(pattern: Any, answer: str, failures: Counter[str]) -> str:
    """The part of a row's answer that replies are compared with: the pattern's, if it matches.

    Args:
        pattern: compiled; None: the whole answer. failures: see `extract`.
    """
    inside = None if pattern is None else extract(pattern, answer, failures)
    return answer if inside is None else inside


def is_missing(rule: AnswerReward, answer: str) -> bool:
    """Whether a row has no answer for the rule."""
    return not answer.strip() or (rule.match == "numeric" and not has_number(answer))


@dataclass
class References:
    """What a rule makes of some reference answers.

    Attributes:
        count: all of them.
        missing: rows without an answer (numeric: without a number).
        unreadable: numeric answers that are no value, so that only the same text equals them.
        missing_examples, unreadable_examples: (row number, answer) of the first ones.
    """

    count: int = 0
    missing: int = 0
    unreadable: int = 0
    missing_examples: list[tuple[int, str]] = field(default_factory=list)
    unreadable_examples: list[tuple[int, str]] = field(default_factory=list)


def read_references(rule: AnswerReward, answers: Iterable[tuple[int, str]]) -> References:
    """Count the answers that a rule cannot use.

    Args:
        answers: (row number, answer) of each row.
    """
    found = References()
    pattern = compile_pattern(rule.pattern) if rule.pattern is not None else None
    for row, answer in answers:
        found.count += 1
        wanted = expected(pattern, answer, Counter())
        if is_missing(rule, wanted):
            found.missing += 1
            examples = found.missing_examples
        elif rule.match == "numeric" and not is_readable(wanted):
            found.unreadable += 1
            examples = found.unreadable_examples
        else:
            continue
        if len(examples) < MOST_EXAMPLES:
            examples.append((row, wanted))
    return found
