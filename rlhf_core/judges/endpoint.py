"""A judge behind an OpenAI-compatible endpoint, asked which of two replies is better.

Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", arXiv 2306.05685, section
3.4: such judges favour a position. So they are asked about each pair in both orders, and a reply
wins only where it wins in both.
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

FIRST_PAUSE = 1.0  # seconds; doubled from try to try
LONGEST_PAUSE = 60.0
_ANSWER = re.compile(r"\[\[\s*([ABC])\s*\]\]")
_BARE = re.compile(r"\W*(?:reply\s+)?([ABC])\W*", re.I)
_VERDICTS: dict[str, Verdict] = {"A": "first", "B": "second", "C": "tie"}
AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})


class EndpointJudge:
    """Compares replies by asking a model over HTTP.

    Attributes:
        counts: what the last comparison was made of: pairs, wins of the left and right side, ties
            (agreed: a tie in both orders; by_position: each order preferred the other reply;
            half: one order undecided), and questions that were left unclear.

    Raises:
        ConfigError: the variable that should hold the key is not set.
    """

    def __init__(self, settings: EndpointJudgeSettings) -> None:
        self.settings = settings
        self.counts: dict[str, int] = {}
        self._key = read_key(settings)
        self._stop = threading.Event()

    def compare(
        self, prompts: Sequence[str], left: Sequence[str], right: Sequence[str]
    ) -> list[float]:
        """For each prompt 1.0 where the left reply is better, 0.0 where the right one is, 0.5 for a
        tie. Identical replies are a tie without being asked for.

        Raises:
            JudgeError: the endpoint refused or went on failing, or too many answers held no
                verdict.
        """
        triples = list(zip(prompts, left, right, strict=True))
        asked = [i for i, (_, a, b) in enumerate(triples) if a != b]
        questions = [
            (prompt, *replies)
            for prompt, a, b in (triples[i] for i in asked)
            for replies in ((a, b), (b, a))
        ]
        verdicts = self._ask_all(questions)
        self._check_clear(verdicts)
        self.counts = dict.fromkeys(
            ("pairs", "left", "right", "agreed", "by_position", "half", "identical"), 0
        )
        self.counts |= {"pairs": len(triples), "identical": len(triples) - len(asked)}
        self.counts["unclear"] = verdicts.count("unclear")
        found = [0.5] * len(triples)
        for place, i in enumerate(asked):
            found[i] = self._agree(*verdicts[2 * place : 2 * place + 2])
        return found

    def _agree(self, straight: Verdict, swapped: Verdict) -> float:
        """One pair's result from its two answers; in the second one left and right had swapped."""
        if (straight, swapped) == ("first", "second"):
            self.counts["left"] += 1
            return 1.0
        if (straight, swapped) == ("second", "first"):
            self.counts["right"] += 1
            return 0.0
        decided = [verdict for verdict in (straight, swapped) if verdict in ("first", "second")]
        self.counts[("agreed", "half", "by_position")[len(decided)]] += 1
        return 0.5

    def _check_clear(self, verdicts: list[Verdict]) -> None:
        unclear = verdicts.count("unclear")
        if unclear > self.settings.max_unclear * len(verdicts):
            raise JudgeError(
                f"{unclear} of {len(verdicts)} answers of {self.settings.model} at "
                f"{self.settings.url} held no verdict ([[A]], [[B]] or [[C]]), at most "
                f"{self.settings.max_unclear:.0%} may: raise the judge's max_new_tokens where "
                "answers are cut off, change its template, or ask a stronger model."
            )

    def _ask_all(self, questions: list[tuple[str, str, str]]) -> list[Verdict]:
        """The verdicts in order; after a first failure nothing more is sent."""
        settings = self.settings
        self._stop.clear()
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx.Limits(max_connections=settings.parallel)
        failures: list[BaseException] = []

        def one(question: tuple[str, str, str]) -> Verdict:
            if self._stop.is_set():
                return "unclear"  # nobody will read it
            try:
                return self._ask(client, *question)
            except BaseException as error:
                failures.append(error)
                self._stop.set()  # ends the pauses of the others too
                raise

        with httpx.Client(headers=headers, timeout=settings.timeout, limits=limits) as client:
            pool = ThreadPoolExecutor(settings.parallel, thread_name_prefix="rlhf-judge")
            try:
                return list(pool.map(one, questions))
            except BaseException:
                self._stop.set()
                if failures:
                    raise failures[0] from None  # later ones only say that they were stopped
                raise
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _ask(self, client: httpx.Client, prompt: str, first: str, second: str) -> Verdict:
        """One question, tried again as often as the settings say."""
        parts = {"{prompt}": prompt, "{first}": first, "{second}": second}
        # In one pass: a reply that holds "{second}" stays as it is.
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
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt) * random.uniform(0.5, 1.0)
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
                elif reply.status_code in AGAIN:
                    problem = self._refusal(reply)
                    pause = max(pause, asked_pause(reply))
                else:
                    raise JudgeError(self._hidden(self._explained(reply)))
            if self._stop.is_set() or (attempt < self.settings.retries and self._stop.wait(pause)):
                break
        if problem == UNCLEAR:
            return "unclear"
        raise JudgeError(
            self._hidden(
                f"The judge at {self.settings.url} failed {attempt + 1} times: {problem}. Check "
                "that it is reachable from where the stage runs; raise the judge's retries or "
                "timeout, or lower parallel."
            )
        )

    def _explained(self, reply: httpx.Response) -> str:
        """An answer that another try would not change."""
        code, told = reply.status_code, self._refusal(reply)
        where = f"The judge at {self.settings.url}"
        if code in (401, 403):
            variable = self.settings.key_variable
            used = f"the key in ${variable}" if variable else "a request without a key"
            return (
                f"{where} refused {used} ({told}). Set the environment variable that the judge's "
                "key_variable names, where the stage runs, to a key that may use "
                f"{self.settings.model}."
            )
        if code == 404:
            return (
                f"{where} knows no model {self.settings.model!r}, or has no /chat/completions "
                f"({told}): check the judge's url (it usually ends in /v1) and model."
            )
        if 300 <= code < 400:
            to = reply.headers.get("location", "elsewhere")
            return f"{where} redirects to {to}; set that as the judge's url."
        return (
            f"{where} refused the request ({told}); check the judge's model, limit_name and "
            "temperature."
        )

    def _refusal(self, reply: httpx.Response) -> str:
        """Status and the endpoint's own words."""
        try:
            value = reply.json()
            error = value.get("error", value) if isinstance(value, dict) else value
            text = error.get("message", error) if isinstance(error, dict) else error
        except ValueError:
            text = reply.text
        words = " ".join(str(text).split())[:300]
        return f"HTTP {reply.status_code}: {words}" if words else f"HTTP {reply.status_code}"

    def _hidden(self, text: str) -> str:
        """Without the key, whatever its variable is called; endpoints like to repeat it."""
        return redact(text.replace(self._key, REDACTED) if self._key else text)


UNCLEAR = "no verdict"


def read_key(settings: EndpointJudgeSettings) -> str:
    """The key from the environment; empty where none is to be sent.

    Raises:
        ConfigError: the variable is not set, or holds what cannot be a key.
    """
    if settings.key_variable is None:
        return ""
    key = os.environ.get(settings.key_variable, "").strip()
    if not key:
        raise ConfigError(
            f"The judge's key is to come from the environment variable {settings.key_variable}, "
            "which is not set: set it where the stage runs (with a work pool, on the worker), or "
            "clear the judge's key_variable for an endpoint without keys."
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError(
            f"The value of the environment variable {settings.key_variable} is no key: it holds "
            "spaces or characters that cannot be sent in a header; set it to the key alone."
        )
    return key


def read_verdict(reply: httpx.Response) -> tuple[str, Verdict | None]:
    """(what is wrong, None) or ("", verdict) of a chat completion.

    The last [[A]], [[B]] or [[C]] counts; a text that is nothing but the letter does as well.
    """
    try:
        value: Any = reply.json()
        text = value["choices"][0]["message"]["content"] or ""
    except (ValueError, KeyError, IndexError, TypeError):
        shown = " ".join(reply.text.split())[:200]
        return f"the answer is no chat completion: {shown!r}", None
    if not isinstance(text, str):
        return f"the answer's content is a {type(text).__name__}, not a text", None
    found = _ANSWER.findall(text)
    bare = _BARE.fullmatch(text.strip())
    if found:
        return "", _VERDICTS[found[-1]]
    if bare:
        return "", _VERDICTS[bare[1].upper()]
    return UNCLEAR, None


def asked_pause(reply: httpx.Response) -> float:
    """Seconds of the header Retry-After (RFC 9110, 10.2.3), at most LONGEST_PAUSE."""
    told = reply.headers.get("retry-after", "")
    try:
        seconds = float(told)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(told).timestamp() - time()
        except (TypeError, ValueError):
            return 0.0
    return min(max(seconds, 0.0), LONGEST_PAUSE) if seconds == seconds else 0.0
