"""LLM-as-a-judge: asks a model behind an OpenAI-compatible endpoint which of two replies is better.

Such judges have a position bias (Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot
Arena", arXiv 2306.05685, section 3.4). So each pair is judged in both orders, and a reply wins only
if it wins in both.
"""

from __future__ import annotations

import os
import random
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from time import time
from typing import Any, Literal

import httpx

from rlhf_core.errors import ConfigError, JudgeError
from rlhf_core.jobs.judging import EndpointJudgeSettings
from rlhf_core.system.secrets import REDACTED, redact

Verdict = Literal["first", "second", "tie", "unclear"]

FIRST_BACKOFF = 1.0  # seconds; doubled with every retry
MAX_BACKOFF = 60.0  # seconds
_ANSWER = re.compile(r"\[\[\s*([ABC])\s*\]\]")
_BARE = re.compile(r"\W*(?:reply\s+)?([ABC])\W*", re.I)
_VERDICTS: dict[str, Verdict] = {"A": "first", "B": "second", "C": "tie"}
RETRY_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})


class EndpointJudge:
    """Compares replies with a model over HTTP.

    Attributes:
        counts: of the last comparison: pairs; wins (left, right); ties (agreed: a tie in both
            orders; by_position: the two orders preferred different replies; half: one order
            undecided; identical: equal replies); unclear: answers without a verdict.

    Raises:
        ConfigError: the environment variable with the key is not set.
    """

    def __init__(self, settings: EndpointJudgeSettings) -> None:
        self.settings = settings
        self.counts: dict[str, int] = {}
        self._key = read_key(settings)
        self._stop = threading.Event()

    def compare(
        self, prompts: Sequence[str], left: Sequence[str], right: Sequence[str]
    ) -> list[float]:
        """Per prompt 1.0 if the left reply is better, 0.0 if the right one is, 0.5 for a tie.

        Identical replies are a tie without a request.

        Raises:
            JudgeError: the endpoint rejected a request or kept failing, or too many answers had no
                verdict.
        """
        triples = list(zip(prompts, left, right, strict=True))
        different = [i for i, (_, a, b) in enumerate(triples) if a != b]
        questions = [
            (prompt, *replies)
            for prompt, a, b in (triples[i] for i in different)
            for replies in ((a, b), (b, a))
        ]
        verdicts = self._query_all(questions)
        self._check_clear(verdicts)
        self.counts = dict.fromkeys(
            ("pairs", "left", "right", "agreed", "by_position", "half", "identical"), 0
        )
        self.counts |= {"pairs": len(triples), "identical": len(triples) - len(different)}
        self.counts["unclear"] = verdicts.count("unclear")
        found = [0.5] * len(triples)
        for i, original, swapped in zip(different, verdicts[::2], verdicts[1::2], strict=True):
            found[i] = self._combine(original, swapped)
        return found

    def _combine(self, original: Verdict, swapped: Verdict) -> float:
        """A pair's result from its verdicts in the two orders."""
        if (original, swapped) == ("first", "second"):
            self.counts["left"] += 1
            return 1.0
        if (original, swapped) == ("second", "first"):
            self.counts["right"] += 1
            return 0.0
        decided = [verdict for verdict in (original, swapped) if verdict in ("first", "second")]
        self.counts[("agreed", "half", "by_position")[len(decided)]] += 1
        return 0.5

    def _check_clear(self, verdicts: list[Verdict]) -> None:
        """Raise JudgeError if more than `max_unclear` of the answers have no verdict."""
        unclear = verdicts.count("unclear")
        if unclear > self.settings.max_unclear * len(verdicts):
            raise JudgeError(
                f"{unclear} of {len(verdicts)} answers of {self.settings.model} at "
                f"{self.settings.url} held no verdict ([[A]], [[B]] or [[C]]), the limit is "
                f"{self.settings.max_unclear:.0%}: raise the judge's max_new_tokens if answers are "
                "cut off, change its template, or use a stronger model."
            )

    def _query_all(self, questions: list[tuple[str, str, str]]) -> list[Verdict]:
        """The verdicts in order; the first failure stops all further requests."""
        settings = self.settings
        self._stop.clear()
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx.Limits(max_connections=settings.parallel)
        failures: list[BaseException] = []

        def one(question: tuple[str, str, str]) -> Verdict:
            if self._stop.is_set():
                return "unclear"  # another question failed, so this result is not used
            try:
                return self._query(client, *question)
            except BaseException as error:
                failures.append(error)
                self._stop.set()  # interrupts the pauses of the other threads too
                raise

        with httpx.Client(headers=headers, timeout=settings.timeout, limits=limits) as client:
            pool = ThreadPoolExecutor(settings.parallel, thread_name_prefix="rlhf-judge")
            try:
                return list(pool.map(one, questions))
            except BaseException:
                self._stop.set()
                if failures:
                    raise failures[0] from None  # the later ones are consequences
                raise
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _query(self, client: httpx.Client, prompt: str, first: str, second: str) -> Verdict:
        """The verdict on one question, with the retries of the settings."""
        parts = {"{prompt}": prompt, "{first}": first, "{second}": second}
        # In one pass, so that a reply that contains "{second}" stays unchanged.
        text = re.sub(r"\{(?:prompt|first|second)\}", lambda m: parts[m[0]], self.settings.template)
        body: dict[str, Any] = {
            "model": self.settings.model,
            "messages": [{"role": "user", "content": text}],
            self.settings.limit_name: self.settings.max_new_tokens,
        }
        if self.settings.temperature is not None:
            body["temperature"] = self.settings.temperature
        problem = ""
        for attempt in range(self.settings.retries + 1):
            pause = min(MAX_BACKOFF, FIRST_BACKOFF * 2**attempt) * random.uniform(0.5, 1.0)
            try:
                reply = client.post(f"{self.settings.url}/chat/completions", json=body)
            except httpx.TimeoutException:
                problem = f"no answer within {self.settings.timeout:g} s"
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if reply.status_code == 200:
                    problem, verdict = read_verdict(reply)
                    if verdict is not None:
                        return verdict
                    pause = 0.0
                elif reply.status_code in RETRY_STATUSES:
                    problem = self._error_text(reply)
                    pause = max(pause, retry_after(reply))
                else:
                    raise JudgeError(self._redact(self._rejection(reply)))
            if self._stop.is_set() or (attempt < self.settings.retries and self._stop.wait(pause)):
                break
        if problem == UNCLEAR:
            return "unclear"
        raise JudgeError(
            self._redact(
                f"The judge at {self.settings.url} failed {attempt + 1} times: {problem}. Check "
                "that the stage's machine can reach it; raise the judge's retries or timeout, or "
                "lower parallel."
            )
        )

    def _rejection(self, reply: httpx.Response) -> str:
        """The error for a reply that a retry would not change."""
        code, error = reply.status_code, self._error_text(reply)
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

    def _error_text(self, reply: httpx.Response) -> str:
        """The status and the endpoint's error message."""
        try:
            value = reply.json()
            error = value.get("error", value) if isinstance(value, dict) else value
            text = error.get("message", error) if isinstance(error, dict) else error
        except ValueError:
            text = reply.text
        words = " ".join(str(text).split())[:300]
        return f"HTTP {reply.status_code}: {words}" if words else f"HTTP {reply.status_code}"

    def _redact(self, text: str) -> str:
        """The text without the key, which some endpoints repeat."""
        return redact(text.replace(self._key, REDACTED) if self._key else text)


UNCLEAR = "no verdict"


def read_key(settings: EndpointJudgeSettings) -> str:
    """The API key from the environment; empty if the settings name no variable.

    Raises:
        ConfigError: the variable is not set, or its value cannot be a key.
    """
    if settings.key_variable is None:
        return ""
    key = os.environ.get(settings.key_variable, "").strip()
    if not key:
        raise ConfigError(
            f"The judge's key comes from the environment variable {settings.key_variable}, which "
            "is not set: set it on the stage's machine (with a work pool, on the worker), or clear "
            "the judge's key_variable for an endpoint without keys."
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError(
            f"The value of the environment variable {settings.key_variable} is not a key: it has "
            "spaces or characters that a header cannot hold; set it to the key alone."
        )
    return key


def read_verdict(reply: httpx.Response) -> tuple[str, Verdict | None]:
    """(problem, None) or ("", verdict) of a chat completion.

    The last [[A]], [[B]] or [[C]] counts. A text that is only the letter counts too.
    """
    try:
        value: Any = reply.json()
        text = value["choices"][0]["message"]["content"] or ""
    except (ValueError, KeyError, IndexError, TypeError):
        shown = " ".join(reply.text.split())[:200]
        return f"the answer is not a chat completion: {shown!r}", None
    if not isinstance(text, str):
        return f"the answer's content is a {type(text).__name__}, not a text", None
    found = _ANSWER.findall(text)
    bare = _BARE.fullmatch(text.strip())
    if found:
        return "", _VERDICTS[found[-1]]
    if bare:
        return "", _VERDICTS[bare[1].upper()]
    return UNCLEAR, None


def retry_after(reply: httpx.Response) -> float:
    """Seconds of the header Retry-After (RFC 9110, 10.2.3), at most LONGEST_PAUSE."""
    header = reply.headers.get("retry-after", "")
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time()
        except (TypeError, ValueError):
            return 0.0
    return min(max(seconds, 0.0), MAX_BACKOFF) if seconds == seconds else 0.0
