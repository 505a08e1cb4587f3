"""Tools behind HTTP.

    GET  url/tools  ->  [{"name", "description", "parameters"}, ...]
    POST url/call   {"name", "arguments", "id"}  ->  {"result": text} or {"error": text}

Why not the Model Context Protocol: its Python client is asynchronous, keeps a session with each
server and brings a web framework along, for what are two requests here. A server that speaks it is
put behind these two routes in a few lines.
"""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx

from rlhf_core.environments.tools import ToolError
from rlhf_core.errors import ConfigError, TrainingFailure
from rlhf_core.jobs.environments import ToolServer
from rlhf_core.judges.posting import (
    PostFailed,
    PostRejected,
    Tries,
    client_for,
    get,
    key_from,
    post,
    without_key,
)

CONNECTIONS = 64  # more than threads that step episodes


class Server:
    """A connection to a server, for all episodes and from several threads."""

    def __init__(self, settings: ToolServer, time_limit: float) -> None:
        """Args:
            time_limit: of one request, seconds.

        Raises:
            ConfigError: the environment variable with the token is not set.
        """
        self.settings = settings
        self._key = key_from(settings.key_variable, "The tool server")
        self._tries = Tries(time_limit, settings.retries)
        self._client = client_for(self._key, time_limit, CONNECTIONS)

    def tools(self) -> list[RemoteTool]:
        """What the server offers.

        Raises:
            TrainingFailure: it does not answer. ConfigError: what it answers is no list of tools.
        """
        answer = self._ask("/tools")
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
        answer = self._ask("/call", body)
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

    def _ask(self, path: str, body: str | None = None) -> httpx.Response:
        """An answer that says something of the request.

        Args:
            body: JSON that is posted; None: a GET.

        Raises:
            TrainingFailure: there is none after all retries, or the token is refused.
        """
        url, never = self.settings.url + path, threading.Event()

        def whole(reply: httpx.Response) -> tuple[str, httpx.Response]:
            return "", reply

        try:
            if body is None:
                return get(self._client, url, whole, self._tries, never)
            return post(self._client, url, body, whole, self._tries, never)
        except PostRejected as rejected:
            if rejected.reply.status_code not in (401, 403):
                return rejected.reply  # a server may say so that a call is wrong
            used = self.settings.key_variable
            raise TrainingFailure(
                f"The tool server at {self.settings.url} refused "
                f"{'the token in $' + used if used else 'a request without a token'} "
                f"(HTTP {rejected.reply.status_code}); set the server's key_variable to an "
                "environment variable with a token that may call its tools."
            ) from None
        except PostFailed as failed:
            times = f"{failed.attempts} time{'s' if failed.attempts > 1 else ''}"
            shown = without_key(failed.problem, self._key)
            raise TrainingFailure(
                f"The tool server at {self.settings.url} failed {times}: {shown}. Start it, or "
                "check that the stage's machine reaches it; then retry: the stage goes on from its "
                "last checkpoint."
            ) from None


class RemoteTool:
    """One tool of a server."""

    def __init__(
        self, server: Server, name: str, description: str, parameters: dict[str, Any]
    ) -> None:
        self._server = server
        self.name, self.description, self.parameters = name, description, parameters

    def call(self, arguments: dict[str, Any], call_id: str) -> str:
        return self._server.call(self.name, arguments, call_id)
