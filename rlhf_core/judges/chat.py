"""One question to a model behind an OpenAI-compatible endpoint, with retries and clear errors."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import httpx

from rlhf_core.errors import JudgeError
from rlhf_core.jobs.judging import EndpointSettings
from rlhf_core.judges.posting import (
    PostFailed,
    PostRejected,
    Tries,
    client_for,
    error_text,
    key_from,
    post,
    without_key,
)

T = TypeVar("T")
UNCLEAR = "no verdict"


class Said(NamedTuple, Generic[T]):
    """An answer."""

    value: T | None  # None: the answer has no verdict, also after all retries
    tokens: int  # of questions and answers, all tries, where the endpoint tells; else 0


class ChatEndpoint:
    """Asks the model of the settings.

    Attributes:
        stop: once set, no request is tried again.

    Raises:
        ConfigError: the environment variable with the key is not set.
    """

    def __init__(self, settings: EndpointSettings) -> None:
        self.settings = settings
        self.stop = threading.Event()
        self._key = key_from(settings.key_variable, "The judge")

    def client(self, parallel: int | None = None) -> httpx.Client:
        """A client for the threads that ask."""
        settings = self.settings
        return client_for(self._key, settings.timeout, parallel or settings.parallel)

    def ask(
        self, client: httpx.Client, parts: Mapping[str, str], read: Callable[[str], T | None]
    ) -> Said[T]:
        """Ask the template's question.

        Args:
            parts: placeholder, such as "{prompt}" -> text.
            read: the verdict in an answer's text; None: it has none, and the model is asked again.

        Raises:
            JudgeError: the endpoint rejected the request, or kept failing.
        """
        settings = self.settings
        # In one pass, so that a reply that contains "{second}" stays unchanged.
        places = "|".join(re.escape(place) for place in parts)
        text = re.sub(places, lambda m: parts[m[0]], settings.template)
        body: dict[str, Any] = {
            "model": settings.model,
            "messages": [{"role": "user", "content": text}],
            settings.limit_name: settings.max_new_tokens,
        }
        if settings.temperature is not None:
            body["temperature"] = settings.temperature

        spent: list[int] = []  # by each answer

        def taken(reply: httpx.Response) -> tuple[str, Said[T] | None]:
            problem, text = completion(reply)
            if text is None:
                return problem, None
            spent.append(tokens_of(reply))
            value = read(text)
            return (UNCLEAR, None) if value is None else ("", Said(value, sum(spent)))

        tries = Tries(settings.timeout, settings.retries)
        try:
            return post(client, f"{settings.url}/chat/completions", body, taken, tries, self.stop)
        except PostRejected as rejected:
            raise JudgeError(without_key(self._rejection(rejected.reply), self._key)) from None
        except PostFailed as failed:
            if failed.problem == UNCLEAR:
                return Said(None, sum(spent))
            raise JudgeError(
                without_key(
                    f"The judge at {settings.url} failed {failed.attempts} times: "
                    f"{failed.problem}. Check that the stage's machine can reach it; raise the "
                    "judge's retries or timeout, or lower parallel.",
                    self._key,
                )
            ) from None

    def _rejection(self, reply: httpx.Response) -> str:
        """The error for a reply that a retry would not change."""
        code, error = reply.status_code, error_text(reply)
        where = f"The judge at {self.settings.url}"
        if code in (401, 403):
            variable = self.settings.key_variable
            used = f"the key in ${variable}" if variable else "a request without a key"
            return (
                f"{where} rejected {used} ({error}). On the stage's machine, set the environment "
                "variable that the judge's key_variable names to a key that may use "
                f"{self.settings.model}."
            )
        if code == 404:
            return (
                f"{where} has no model {self.settings.model!r}, or no /chat/completions "
                f"({error}): check the judge's url (it usually ends in /v1) and model."
            )
        if 300 <= code < 400:
            to = reply.headers.get("location", "elsewhere")
            return f"{where} redirects to {to}; set that as the judge's url."
        return (
            f"{where} rejected the request ({error}); check the judge's model, limit_name and "
            "temperature."
        )


def completion(reply: httpx.Response) -> tuple[str, str | None]:
    """(problem, None) or ("", text) of a chat completion."""
    try:
        value: Any = reply.json()
        text = value["choices"][0]["message"]["content"] or ""
    except (ValueError, KeyError, IndexError, TypeError):
        shown = " ".join(reply.text.split())[:200]
        return f"the answer is not a chat completion: {shown!r}", None
    if not isinstance(text, str):
        return f"the answer's content is a {type(text).__name__}, not a text", None
    return "", text


def tokens_of(reply: httpx.Response) -> int:
    """Tokens of question and answer by the completion's `usage`; 0 where it has none."""
    try:
        return max(0, int(reply.json()["usage"]["total_tokens"]))
    except (ValueError, KeyError, TypeError):
        return 0
