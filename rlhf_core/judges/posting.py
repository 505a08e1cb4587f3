"""Requests to a service over HTTP: which failures are worth another try, and for how long.

PostFailed     the service kept failing, or the caller told it to stop
PostRejected   an answer that another try would not change
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from time import monotonic, time
from typing import Any, TypeVar

import httpx

from rlhf_core.errors import ConfigError
from rlhf_core.system.secrets import REDACTED, redact

FIRST_BACKOFF = 1.0  # seconds; doubled with every retry
MAX_BACKOFF = 60.0  # seconds
RETRY_STATUSES = frozenset({408, 409, 425, 429, *range(500, 600)})

NOT_BY_PROXY = dict.fromkeys(("all://localhost", "all://127.0.0.1", "all://[::1]"))

T = TypeVar("T")
Read = Callable[[httpx.Response], tuple[str, T | None]]
"""Reads a whole answer: ("", value), or what is wrong with it and None."""


class PostFailed(Exception):
    """No usable answer. Attributes: problem, of the last try; attempts."""

    def __init__(self, problem: str, attempts: int) -> None:
        super().__init__(problem)
        self.problem, self.attempts = problem, attempts


class PostRejected(Exception):
    """The service refused. Attributes: reply."""

    def __init__(self, reply: httpx.Response) -> None:
        super().__init__(f"HTTP {reply.status_code}")
        self.reply = reply


@dataclass(frozen=True)
class Tries:
    """How often and how long a request is tried; `timeout` in seconds for one try."""

    timeout: float
    retries: int


def post(
    client: httpx.Client,
    url: str,
    body: Mapping[str, Any] | str,
    read: Read[T],
    tries: Tries,
    stop: threading.Event,
) -> T:
    """POST JSON, or a text that is JSON. See `_asked`."""
    sent: dict[str, Any] = {"json": body}
    if isinstance(body, str):
        sent = {"content": body, "headers": {"content-type": "application/json"}}
    return _asked(client, client.build_request("POST", url, **sent), read, tries, stop)


def get(client: httpx.Client, url: str, read: Read[T], tries: Tries, stop: threading.Event) -> T:
    """GET. See `_asked`."""
    return _asked(client, client.build_request("GET", url), read, tries, stop)


def _asked(
    client: httpx.Client,
    request: httpx.Request,
    read: Read[T],
    tries: Tries,
    stop: threading.Event,
) -> T:
    """Send a request, again after failures that may pass: no answer, busy, broken, not readable.

    Pauses double, with chance in them; the service's Retry-After is kept. An answer that came and
    cannot be read is asked for again at once.

    Args:
        stop: ends the pauses, and with them the tries.

    Raises:
        PostFailed, PostRejected: see above.
    """
    problem = ""
    for attempt in range(tries.retries + 1):
        pause = min(MAX_BACKOFF, FIRST_BACKOFF * 2**attempt) * random.uniform(0.5, 1.0)
        try:
            reply = _answer(client, request, tries.timeout)
        except httpx.TimeoutException:
            problem = f"no answer within {tries.timeout:g} s"
        except (httpx.TransportError, httpx.DecodingError) as error:
            problem = f"{type(error).__name__}: {error}"
        else:
            if reply.status_code == 200:
                problem, value = read(reply)
                if value is not None:
                    return value
                pause = 0.0
            elif reply.status_code in RETRY_STATUSES:
                problem = error_text(reply)
                pause = max(pause, retry_after(reply))
            else:
                raise PostRejected(reply)
        if stop.is_set() or (attempt < tries.retries and stop.wait(pause)):
            break
    raise PostFailed(problem, attempt + 1)


def _answer(client: httpx.Client, request: httpx.Request, seconds: float) -> httpx.Response:
    """The whole answer. The client's own limit is one of each wait for more of it, and some
    services send spaces for as long as they compute.

    Raises:
        httpx.TimeoutException: it did not end in so many seconds.
    """
    end, parts = monotonic() + seconds, []
    with contextlib.closing(client.send(request, stream=True)) as reply:
        for part in reply.iter_raw():
            parts.append(part)
            if monotonic() > end:
                raise httpx.ReadTimeout("the answer does not end", request=request)
    return httpx.Response(reply.status_code, headers=reply.headers, content=b"".join(parts))


def error_text(reply: httpx.Response) -> str:
    """The status and the service's error message."""
    try:
        value = reply.json()
        error = value.get("error", value) if isinstance(value, dict) else value
        text = error.get("message", error) if isinstance(error, dict) else error
    except ValueError:
        text = reply.text
    words = " ".join(str(text).split())[:300]
    return f"HTTP {reply.status_code}: {words}" if words else f"HTTP {reply.status_code}"


def retry_after(reply: httpx.Response) -> float:
    """Seconds of the header Retry-After (RFC 9110, 10.2.3), at most MAX_BACKOFF."""
    header = reply.headers.get("retry-after", "")
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time()
        except (TypeError, ValueError):
            return 0.0
    return min(max(seconds, 0.0), MAX_BACKOFF) if seconds == seconds else 0.0


def key_from(variable: str | None, who: str) -> str:
    """The key in an environment variable; empty without a variable.

    Args:
        who: has the setting key_variable, such as "The judge".

    Raises:
        ConfigError: the variable is not set, or its value cannot be a key.
    """
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(
            f"{who}'s key comes from the environment variable {variable}, which is not set: set it "
            f"on the stage's machine (with a work pool, on the worker), or clear {who.lower()}'s "
            "key_variable for an endpoint without keys."
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError(
            f"The value of the environment variable {variable} is not a key: it has spaces or "
            "characters that a header cannot hold; set it to the key alone."
        )
    return key


def without_key(text: str, key: str) -> str:
    """The text without the key, which some services repeat, and without other secrets."""
    return redact(text.replace(key, REDACTED) if key else text)


def client_for(key: str, timeout: float, parallel: int) -> httpx.Client:
    """A client that sends the key, for threads that share its connections.

    A service of this machine is asked directly, also where the environment names a proxy.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=parallel)
    return httpx.Client(headers=headers, timeout=timeout, limits=limits, mounts=NOT_BY_PROXY)
