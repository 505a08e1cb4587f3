"""A user's own function: what it is called with, and each way in which it can fail."""

from __future__ import annotations

import time

import pytest

from rlhf_core.errors import ConfigError, TrainingFailure
from rlhf_core.jobs.rewards import PythonReward
from rlhf_core.rewards import Rules
from tests.rlhf_core.rewards.helpers import HERE, score


def rule(name: str, **settings) -> PythonReward:
    return PythonReward(function=f"{HERE}:{name}", **settings)


def test_function_is_called_once_with_the_whole_batch():
    assert score(rule("brevity"), "", "a", "😀😀😀") == [1.0, 0.5, 0.25]
    rules = Rules([rule("sees_all")], seed=0)
    prompts = [[{"role": "user", "content": "你好"}], [{"role": "user", "content": "abc"}]]
    found = rules.score(prompts, ["", "xy"], [{"row": 1}, {"row": 2}], [True, False])
    assert found == [[2 + 0 + 100 + 1, 3 + 20 + 200 + 0]]
    assert score(rule("an_array"), "a", "b") == [0.0, 1.0]
    assert rules.names == ["python"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises_at_bad", r"raises_at_bad raised KeyError: 'no such thing' \(sample 1 of 2, "
                          r"prompt row 7, reply 'bad'\); at .*helpers.py, line \d+: raise KeyErr"),
        ("raises_for_two", r"raised TimeoutError: not the limit's \(none of the 2"),
        ("leaves", "leaves raised SystemExit: 3"),
        ("wrong_names", "raised TypeError: wrong_names"),
        ("too_few", "too_few returned 1 values; expected one finite number for each of the 2"),
        ("not_finite", r"not_finite returned nan for sample 1 of 2 \(reply 'bad'\)"),
        ("a_text", "a_text returned '1' for sample 1 of 2"),
        ("a_number", "a_number returned a float; expected"),
    ],
)  # fmt: skip
def test_failure_names_the_function_and_the_sample(name, message):
    with pytest.raises(TrainingFailure, match=message):
        score(rule(name), "good", "bad")


def test_function_that_takes_too_long_fails_in_time():
    started = time.monotonic()
    with pytest.raises(TrainingFailure, match=r"sleeps took more than 0.2 s for 2 samples"):
        score(rule("sleeps", time_limit=0.2), "a", "b")
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module_here:f", "module no_such_module_here cannot be imported"),
        (f"{HERE}:no_such_function", "correct the function's name"),
        (f"{HERE}:NOT_CALLABLE", "is a int; expected a function"),
    ],
)
def test_function_that_is_not_there_is_refused(path, message):
    with pytest.raises(ConfigError, match=message):
        Rules([PythonReward(function=path)], seed=0)
