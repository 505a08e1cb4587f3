"""Tools behind HTTP.

    GET  url/tools  ->  [{"name", "description", "parameters"}, ...]
    POST url/call   {"name", "arguments", "id"}  ->  {"result": text} or {"error": text}

Why not the Model Context Protocol: its Python client is asynchronous, keeps a session with each
server and brings a web framework along, for what are two requests here. A server that speaks it is
put behind these two routes in a few lines.
"""

from __future__ import annotations

import json
import os
import random
import time
from typing import Any

import httpx

from rlhf_core.environments.tools import ToolError
from rlhf_core.errors import ConfigError, TrainingFailure
from rlhf_core.jobs.environments import ToolServer
from rlhf_core.system.secrets import REDACTED, redact

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds; doubled with every retry
RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})


class Server:
    """A connection to a server, for all episodes and from several threads."""

    def __init__(self, settings: ToolServer, time_limit: float) -> None:
        """Args:
            time_limit: of one request, seconds.

        Raises:
            ConfigError: the environment variable with the token is not set.
        """
        self.settings = settings
        self._time_limit = time_limit
        self._key = read_token(settings)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx.Client(headers=headers, timeout=time_limit)

    def tools(self) -> list[RemoteTool]:
        """What the server offers.

        Raises:
            TrainingFailure: it does not answer. ConfigError: what it answers is no list of tools.
        """
        answer = self._ask("GET", "/tools")
        try:
            listed = answer.json()
            found = [
                RemoteTool(
                    self, str(x["name"]), str(x.get("description", "")), dict(x["parameters"])
                )
                for x in listed
            ]
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ConfigError(
                f"The tool server at {self.settings.url} answered GET /tools with "
                f"{answer.text[:200]!r}; expected a JSON list of objects with name, description "
                "and parameters."
            ) from None
        return found

    def call(self, name: str, arguments: dict[str, Any], call_id: str) -> str:
        """The result of a call. Raises as `Tool.call`."""
        try:  # the policy may have written what JSON has no form for, such as NaN
            body = json.dumps(
                {"name": name, "arguments": arguments, "id": call_id}, allow_nan=False
            )
        except (TypeError, ValueError, RecursionError) as error:
            raise ToolError(f"the arguments cannot be written as JSON ({error})") from None
        answer = self._ask("POST", "/call", body)
        try:
            value = answer.json()
        except ValueError:
            value = None
        if isinstance(value, dict) and "error" in value:
            raise ToolError(str(value["error"]))
        if not isinstance(value, dict) or "result" not in value:
            raise TrainingFailure(
                f"The tool server at {self.settings.url} answered a call of {name} with HTTP "
                f"{answer.status_code} and {answer.text[:200]!r}; expected a JSON object with "
                "result or error."
            )
        result = value["result"]
        return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)

    def _ask(self, method: str, path: str, body: str | None = None) -> httpx.Response:
        """An answer that says something of the request.

        Args:
            body: JSON; None: none.

        Raises:
            TrainingFailure: there is none after all retries, or the token is refused.
        """
        problem, attempts = "", self.settings.retries + 1
        sent = {} if body is None else {"content-type": "application/json"}
        for attempt in range(attempts):
            try:
                answer = self._client.request(
                    method, self.settings.url + path, content=body, headers=sent
                )
            except httpx.TimeoutException:
                problem = f"no answer within {self._time_limit:g} s"
            except httpx.HTTPError as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if answer.status_code in (401, 403):
                    used = self.settings.key_variable
                    raise TrainingFailure(
                        f"The tool server at {self.settings.url} refused "
                        f"{'the token in $' + used if used else 'a request without a token'} "
                        f"(HTTP {answer.status_code}); set the server's key_variable to an "
                        "environment variable with a token that may call its tools."
                    )
                if answer.status_code not in RETRIED:
                    return answer
                problem = f"HTTP {answer.status_code}: {answer.text[:200]}"
            if attempt + 1 < attempts:
                time.sleep(min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt) * random.uniform(0.5, 1.0))
        shown = redact(problem.replace(self._key, REDACTED) if self._key else problem)
        times = f"{attempts} time{'s' if attempts > 1 else ''}"
        raise TrainingFailure(
            f"The tool server at {self.settings.url} failed {times}: {shown}. Start it, or "
            "check that the stage's machine reaches it; then retry: the stage goes on from its "
            "last checkpoint."
        )


class RemoteTool:
    """One tool of a server."""

    def __init__(
        self, server: Server, name: str, description: str, parameters: dict[str, Any]
    ) -> None:
        self._server = server
        self.name, self.description, self.parameters = name, description, parameters

    def call(self, arguments: dict[str, Any], call_id: str) -> str:
        return self._server.call(self.name, arguments, call_id)


def read_token(settings: ToolServer) -> str:
    """The token from the environment; empty if the settings name no variable.

    Raises:
        ConfigError: the variable is not set.
    """
    if settings.key_variable is None:
        return ""
    token = os.environ.get(settings.key_variable, "").strip()
    if not token:
        raise ConfigError(
            f"The token of the tool server {settings.url} comes from the environment variable "
            f"{settings.key_variable}, which is not set: set it on the stage's machine, or clear "
            "the server's key_variable."
        )
    return token
