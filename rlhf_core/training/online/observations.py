"""What environments give, checked and made fit to be written by a chat template."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

from rlhf_core.data.rows.row import Message
from rlhf_core.environments.interface import Step
from rlhf_core.errors import RLHFError, TrainingFailure
from rlhf_core.rewards.user_code import Raised, call_in_time, raised_at

Where = Literal["reset", "step"]


def as_messages(given: Any, where: Where) -> list[Any]:
    """What a policy is to see next, as a list; a text is a turn of the user.

    Raises:
        TrainingFailure: it is neither a text nor a list.
    """
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if isinstance(given, Sequence) and not isinstance(given, bytes):
        return list(given)
    nothing = "None" if where == "reset" else "done"
    raise TrainingFailure(
        f"The environment's {where} gave {str(given)[:200]}; expected a text, a list of messages "
        f'({{"role": "user" or "tool", "content": text}}), or {nothing}.'
    )


def checked_messages(
    messages: Sequence[Any],
    where: Where,
    find_special: Callable[[str], str | None],
    counts: Counter[str],
) -> list[Message]:
    """The messages, with what no tokenizer can read, and what would end a turn in its middle, taken
    out of their texts.

    Args:
        find_special: the first special token in a text. counts: counts what was taken out.

    Raises:
        TrainingFailure: one is no message, or there is none.
    """
    found: list[Message] = []
    for message in messages:
        good = isinstance(message, dict) and isinstance(message.get("content"), str)
        if not good or message.get("role") not in ("system", "user", "assistant", "tool"):
            raise TrainingFailure(
                f"The environment's {where} gave the message {str(message)[:200]}; expected "
                '{"role": "user" or "tool", "content": text}.'
            )
        text = whole_characters(message["content"])
        if text != message["content"]:
            counts["characters_replaced"] += 1
        while marker := find_special(text):
            text = text.replace(marker, "")
            counts["special_tokens_removed"] += 1
        found.append({**message, "content": text})
    if not found:
        raise TrainingFailure(
            f"The environment's {where} gave no message; expected what the policy sees next, or "
            "done."
        )
    return found


def whole_characters(text: str) -> str:
    """The text with U+FFFD in place of halves of characters (lone surrogates), as other programs
    leave them where they cut a text."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def checked_step(value: Any) -> Step:
    """What `step` gave, as a Step.

    Raises:
        TrainingFailure: it is something else.
    """
    try:
        if not isinstance(value, tuple) or len(value) < 3:
            raise TypeError(f"a {type(value).__name__}")
        step = Step(*value)
        reward = float(step.reward)
        if not math.isfinite(reward):
            raise ValueError(f"a reward of {reward}")
        counts = {str(name): int(number) for name, number in step.counts.items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise TrainingFailure(
            f"The environment's step gave {str(value)[:200]} ({error}); expected (observation, "
            "reward, done), the reward a finite number."
        ) from None
    return Step(step.observation, reward, bool(step.done), counts)


def in_time(function: Callable[[], Any], what: str, which: str, seconds: float) -> Any:
    """The result of an environment's code.

    Args:
        what: of the environment is called. which: for what prompt and reply. Both for messages.

    Raises:
        TrainingFailure: it raised something, or took too long.
    """
    try:
        return call_in_time(function, seconds, "environment")
    except TimeoutError:
        raise TrainingFailure(
            f"The environment's {what} took more than {seconds:g} s ({which}); make it faster, or "
            "raise environment.time_limit."
        ) from None
    except Raised as raised:
        error = raised.error
        if isinstance(error, RLHFError):
            raise error from None
        raise TrainingFailure(
            f"The environment's {what} raised {type(error).__name__}: {str(error)[:300]} "
            f"({which}); {raised_at(error)}."
        ) from error
