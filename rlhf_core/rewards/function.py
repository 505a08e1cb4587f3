"""A user's reward function: imported, called with a time limit, its result checked."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from rlhf_core.errors import ConfigError, TrainingFailure
from rlhf_core.jobs.rewards import PythonReward
from rlhf_core.rewards.user_code import Raised, call_in_time, load_object, raised_at

MAX_SHOWN = 300  # characters of a value in a message


def load_function(path: str) -> Callable[..., Any]:
    """The function that `package.module:function` names.

    Raises:
        ConfigError: the module cannot be imported, or has no such function.
    """
    found = load_object(path, "Reward", "the function's name")
    if not callable(found):
        raise ConfigError(
            f"Reward {path} is a {type(found).__name__}; expected a function that takes prompts, "
            "replies, rows and finished."
        )
    return found  # type: ignore[no-any-return]


def user_function(rule: PythonReward) -> Callable[..., list[float]]:
    """The user's function with a time limit and a check of its result.

    Each call runs in its own thread. Python cannot stop a thread: after a timeout it continues
    until the process ends, which the error causes. Code that holds Python's interpreter lock (an
    endless regular expression of `re`) is not interrupted; then only the ranks' time limits apply.

    Returns:
        A function of prompts, replies, rows and finished, which returns one score per sample and
        raises TrainingFailure if the user's function fails.

    Raises:
        ConfigError: there is no such function.
    """
    function = load_function(rule.function)

    def call(**batch: list[Any]) -> list[float]:
        started = time.monotonic()
        try:
            result = _call_in_time(function, batch, rule.time_limit)
        except TimeoutError:
            raise TrainingFailure(
                f"Reward {rule.function} took more than {rule.time_limit:g} s for "
                f"{len(batch['replies'])} samples; make it faster, or raise its time_limit."
            ) from None
        except Raised as raised:
            error = raised.error
            left = rule.time_limit - (time.monotonic() - started)
            which = _failing_sample(function, batch, left)
            raise TrainingFailure(
                f"Reward {rule.function} raised {type(error).__name__}: {str(error)[:MAX_SHOWN]} "
                f"({which}); {raised_at(error)}."
            ) from error
        return _check_result(rule.function, result, batch["replies"])

    return call


def _call_in_time(function: Callable[..., Any], batch: dict[str, list[Any]], seconds: float) -> Any:
    """function(**batch), for at most so many seconds.

    Raises:
        TimeoutError: the call took longer.
        Raised: the function raised an exception.
    """

    def call() -> Any:
        return function(**{name: list(part) for name, part in batch.items()})

    return call_in_time(call, seconds, "reward")


def _failing_sample(
    function: Callable[..., Any], batch: dict[str, list[Any]], seconds: float
) -> str:
    """Describes the sample that fails: tries each one alone, for at most so many seconds."""
    count = len(batch["replies"])
    end = time.monotonic() + seconds
    for index in range(count):
        one = {name: part[index : index + 1] for name, part in batch.items()}
        if (left := end - time.monotonic()) <= 0:
            return f"sample {index} of {count} or a later one"
        try:
            _call_in_time(function, one, left)
        except TimeoutError:
            return f"sample {index} of {count} or a later one"
        except Raised:
            reply = batch["replies"][index]
            row = batch["rows"][index].get("row", "?")
            return f"sample {index} of {count}, prompt row {row}, reply {reply[:80]!r}"
    return f"none of the {count} samples fails alone"


def _check_result(path: str, result: Any, replies: list[str]) -> list[float]:
    """The result as floats.

    Raises:
        TrainingFailure: it is not one finite number per sample.
    """
    expected = f"expected one finite number for each of the {len(replies)} samples"
    try:
        values = result.tolist() if hasattr(result, "tolist") else list(result)
        assert isinstance(values, list)
    except (TypeError, AssertionError):
        raise TrainingFailure(
            f"Reward {path} returned a {type(result).__name__}; {expected}, in a list."
        ) from None
    if len(values) != len(replies):
        raise TrainingFailure(f"Reward {path} returned {len(values)} values; {expected}.")
    numbers = []
    for index, value in enumerate(values):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if isinstance(value, str | bytes) or not math.isfinite(number):
            raise TrainingFailure(
                f"Reward {path} returned {repr(value)[:MAX_SHOWN]} for sample {index} of "
                f"{len(replies)} (reply {replies[index][:80]!r}); {expected}."
            )
        numbers.append(number)
    return numbers
