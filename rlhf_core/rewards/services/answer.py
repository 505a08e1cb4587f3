"""What a service is asked about, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx

from rlhf_core.data.rows.row import Message


@dataclass(frozen=True)
class Item:
    """A reply to be scored."""

    prompt: list[Message]
    reply: str  # without special tokens
    finished: bool  # ended with its end-of-turn token
    row: Mapping[str, Any]  # of the prompts data set; `answer` and `extra` may be missing or empty


@dataclass(frozen=True)
class Answer:
    """A service's answer about one reply."""

    score: float
    components: dict[str, float] = field(default_factory=dict)  # for metrics only
    failure: str = ""  # why the reply got the lowest score, if the service could not judge it


Question = Mapping[str, Any]
"""All that an answer depends on, as JSON. Equal questions are asked once."""


class Backend(Protocol):
    """How one reward asks its service."""

    parallel: int  # requests in flight at once
    batch_size: int  # most questions in a request
    identity: Mapping[str, Any]  # settings that answers depend on, as JSON

    def question(self, item: Item) -> Question:
        """What is asked about a reply.

        Raises:
            DataError: the row lacks what the service needs.
        """

    def ask(self, client: httpx.Client, questions: list[Question]) -> list[Answer]:
        """Ask; from several threads at once.

        Raises:
            RLHFError: the service refused, kept failing, or gave what cannot be read.
        """

    def client(self) -> httpx.Client:
        """A client for all threads."""

    def stop(self) -> None:
        """Try no request again."""

    def check(self, answers: list[Answer]) -> None:
        """Raise RLHFError if too many of a rollout's replies could not be judged."""
