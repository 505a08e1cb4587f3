"""What an environment is: it answers the replies of a policy, and says what they are worth.

An environment of your own is a class with the two methods of `Environment`, and no arguments. There
is one object for each episode. Objects of different episodes are called from different threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from rlhf_core.data.rows.row import Message

NOTHING: Mapping[str, int] = MappingProxyType({})


class Step(NamedTuple):
    """What follows a reply. A tuple of the first three is as good."""

    observation: str | Sequence[Message] = ""
    """What the policy sees next: the text of a user's turn, or messages (role user or tool). It is
    not used when the episode is over."""
    reward: float = 0.0
    """Of this step; an episode has the sum of its steps."""
    done: bool = False
    """Whether the episode is over."""
    counts: Mapping[str, int] = NOTHING
    """What is to be counted over the rollout, by name, such as tool_calls."""


class Environment(Protocol):
    """One episode."""

    def reset(self, row: dict[str, Any]) -> str | Sequence[Message] | None:
        """Begin.

        Args:
            row: of the prompts: `prompt` (messages), `reference`, `answer` and `extra` as far as it
                has them, and `episode`, an id. It comes again when a run that was killed samples
                the same episode again.

        Returns:
            The messages that the policy sees first, or the text of a user's turn; None: the row's
            prompt.
        """

    def step(self, reply: str, ids: Sequence[int]) -> Step:
        """Answer a reply. One that was cut at max_new_tokens ends the episode without this.

        Args:
            reply: its text without the end of turn; markers of tool calls are in it.
            ids: its tokens as they were sampled; the last one ends the turn.
        """
