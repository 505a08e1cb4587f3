"""The HTTP reward protocol, the client's side. docs/rewards.md has the JSON.

    request   {"items": [{"prompt": [{"role", "content"}], "reply", "finished", "row": {...}}, ...]}
    answer    {"scores": [0.7, ...], "components": {"helpful": [0.9, ...]}}

One number for each item, in their order; `components` may be missing.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from typing import Any

import httpx

from rlhf_core.errors import JudgeError
from rlhf_core.jobs.reward_services import HttpReward, ServiceReward
from rlhf_core.judges.posting import (
    PostFailed,
    PostRejected,
    Read,
    T,
    Tries,
    client_for,
    error_text,
    key_from,
    post,
    without_key,
)
from rlhf_core.rewards.services.answer import Answer, Item, Question

LARGEST = 1e9  # of a score: what a 32-bit sum of them still holds


class OwnService:
    """What rewards of services of one's own have in common.

    Args:
        who: in errors, such as "The reward service".

    Raises:
        ConfigError: the environment variable with the key is not set.
    """

    batch_size = 1

    def __init__(self, settings: ServiceReward, who: str) -> None:
        self.parallel = settings.parallel
        excluded = {*settings.excluded_from_key, "weight"}
        self.identity: Mapping[str, Any] = settings.model_dump(mode="json", exclude=excluded)
        self._service, self._who = settings, who
        self._key = key_from(settings.key_variable, who)
        self._stop = threading.Event()

    def client(self) -> httpx.Client:
        """A client for all threads."""
        return client_for(self._key, self._service.timeout, self.parallel)

    def stop(self) -> None:
        """Try no request again."""
        self._stop.set()

    def check(self, answers: list[Answer]) -> None:
        """No answer is unclear."""

    def post(self, client: httpx.Client, url: str, body: Mapping[str, Any], read: Read[T]) -> T:
        """POST with the retries of the settings.

        Raises:
            JudgeError: refused, or failed after all retries.
        """
        settings = self._service
        tries = Tries(settings.timeout, settings.retries)
        try:
            return post(client, url, body, read, tries, self._stop)
        except PostRejected as rejected:
            text = self._rejection(rejected.reply, url)
        except PostFailed as failed:
            text = (
                f"{self._who} at {url} failed {failed.attempts} times: {failed.problem}. Check "
                "that the stage's machine can reach it and what it answers; raise the reward's "
                "retries or timeout, or lower parallel or batch_size."
            )
        raise JudgeError(without_key(text, self._key))

    def _rejection(self, reply: httpx.Response, url: str) -> str:
        code, error = reply.status_code, error_text(reply)
        if code in (401, 403):
            variable = self._service.key_variable
            used = f"the key in ${variable}" if variable else "a request without a key"
            return (
                f"{self._who} at {url} rejected {used} ({error}). On the stage's machine, set the "
                "environment variable that the reward's key_variable names to its key."
            )
        if 300 <= code < 400:
            to = reply.headers.get("location", "elsewhere")
            return f"{self._who} at {url} redirects to {to}; set that as the reward's url."
        return f"{self._who} at {url} rejected the request ({error}); check the reward's url."


class HttpScorer(OwnService):
    """Asks a service that speaks the protocol."""

    def __init__(self, settings: HttpReward) -> None:
        super().__init__(settings, "The reward service")
        self.settings = settings
        self.batch_size = settings.batch_size

    def question(self, item: Item) -> Question:
        """An item of the request."""
        return {
            "prompt": item.prompt,
            "reply": item.reply,
            "finished": item.finished,
            "row": {name: item.row[name] for name in self.settings.columns if name in item.row},
        }

    def ask(self, client: httpx.Client, questions: list[Question]) -> list[Answer]:
        """One request."""

        def read(reply: httpx.Response) -> tuple[str, list[Answer] | None]:
            try:
                return "", read_answers(reply, len(questions))
            except ValueError as error:
                return str(error), None

        return self.post(client, self.settings.url, {"items": questions}, read)


def read_answers(reply: httpx.Response, count: int) -> list[Answer]:
    """The answers about so many items.

    Raises:
        ValueError: the answer is not of the protocol; says what it is.
    """
    try:
        value: Any = reply.json()
    except ValueError:
        shown = " ".join(reply.text.split())[:200]
        raise ValueError(f"the answer is not JSON: {shown!r}") from None
    if not isinstance(value, dict) or "scores" not in value:
        raise ValueError('the answer has no "scores"; expected {"scores": [one for each item]}')
    scores = numbers(value["scores"], count, "scores")
    given = value.get("components") or {}
    if not isinstance(given, dict) or not all(_is_name(name) for name in given):
        raise ValueError(
            'the answer\'s "components" are not {name: [one number for each item]} with names of '
            "letters, digits and _"
        )
    columns = {name: numbers(part, count, f"components.{name}") for name, part in given.items()}
    return [
        Answer(score, {name: column[i] for name, column in columns.items()})
        for i, score in enumerate(scores)
    ]


def numbers(value: Any, count: int, what: str) -> list[float]:
    """A list of so many finite numbers.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, list):
        raise ValueError(f'the answer\'s "{what}" is a {type(value).__name__}; expected a list')
    if len(value) != count:
        raise ValueError(f'the answer\'s "{what}" has {len(value)} values for {count} items')
    for i, x in enumerate(value):
        number = isinstance(x, int | float) and not isinstance(x, bool)
        if not number or not math.isfinite(x) or abs(x) > LARGEST:
            raise ValueError(
                f'the answer\'s "{what}" has {str(x)[:40]!r} for item {i}; expected a number from '
                f"-{LARGEST:g} to {LARGEST:g}"
            )
    return [float(x) for x in value]


def _is_name(name: str) -> bool:
    return name.isascii() and name.replace("_", "a").isalnum() and len(name) <= 60
