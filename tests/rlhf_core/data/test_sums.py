"""The built-in sums: their answers, and the calls that compute them."""

from __future__ import annotations

import pytest

from rlhf_core.data.sources.builtin import is_subset, version
from rlhf_core.data.sources.sums import COUNT, TOOL, rows
from rlhf_core.environments.calculator import calculator
from rlhf_core.environments.make import make_environments
from rlhf_core.errors import DataError
from rlhf_core.jobs.environments import CalculatorEnvironment


def test_answers_are_what_the_calculator_computes():
    questions, calls = list(rows(None)), list(rows("calls"))
    assert len(questions) == len(calls) == COUNT
    seen = set()
    for asked, talk in zip(questions, calls, strict=True):
        user, call, result, reply = talk.data["messages"]
        expression = call["tool_calls"][0]["function"]["arguments"]["expression"]
        answer = asked.data["answer"]
        assert calculator(expression) == answer == result["content"]
        assert reply["content"] == f"The answer is {answer}."
        assert user["content"] == asked.data["prompt"] and int(answer) > 0
        assert set("{}").isdisjoint(user["content"] + expression)
        seen.add(user["content"])
    assert len(seen) > 0.9 * COUNT


def test_tool_of_the_conversations_is_that_of_the_environment():
    (schema,) = make_environments(CalculatorEnvironment()).schemas
    assert schema == TOOL


def test_subsets_are_named():
    assert version("sums") == "1" and is_subset("calls") and not is_subset("neither")
    with pytest.raises(DataError, match="questions, calls"):
        list(rows("english"))
