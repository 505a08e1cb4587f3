"""Chooses the Prefect server of a command, and sets the environment before Prefect is imported.

Where no server runs, a temporary one is started in a child process.
"""

from __future__ import annotations

import atexit
import base64
import json
import os
import signal
import subprocess
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from flows import api_server
from rlhf_core.errors import ConfigError
from rlhf_core.system.ports import free_ports
from rlhf_core.system.private import private_folder
from rlhf_core.system.processes import die_with_parent

DEFAULT_URL = "http://127.0.0.1:4200/api"

QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
}
# Prefect's variables for a server that ends with its client and has no pages.
TEMPORARY = {
    "PREFECT_SERVER_UI_ENABLED": "0",
    "PREFECT__SERVER_EPHEMERAL": "1",
}
START_SECONDS = 180.0
temporary: TemporaryServer | None = None  # this process's


@dataclass(frozen=True)
class Server:
    """The chosen server.

    Attributes:
        url: of its API; None for a temporary server.
        text: the server, and why it was chosen, for the user.
        problem: of the one that was looked for, where it is a temporary one.
    """

    url: str | None
    text: str
    problem: str = field(default="", compare=False)


def choose_server() -> Server:
    """Set the environment for Prefect; returns the server that Prefect will use."""
    from flows.cli.system import use_login

    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    url, origin = _configured()
    use_login(url or DEFAULT_URL)
    if "PREFECT_HOME" not in os.environ and origin != "profile":
        os.environ["PREFECT_HOME"] = str(private_folder("prefect"))
    if url is not None:
        where = "PREFECT_API_URL" if origin == "environment" else "the Prefect profile's URL"
        if problem := unreachable(url, 5.0):
            reason = (
                f"{where} is {url}, where no Prefect server answers: {problem}{_at_its_api(url)}"
            )
        elif origin == "environment" and (problem := closed(url, 5.0)):
            reason = f"{where} is {url}, which refuses: {problem}"
        else:
            return Server(url, url)
    elif unreachable(DEFAULT_URL, 1.0) is not None:
        reason = "PREFECT_API_URL is not set"
    elif problem := closed(DEFAULT_URL, 5.0):
        reason = f"{DEFAULT_URL} runs, and refuses: {problem}"
    else:
        os.environ["PREFECT_API_URL"] = DEFAULT_URL
        return Server(DEFAULT_URL, f"{DEFAULT_URL} (found running)")
    os.environ.pop("PREFECT_API_URL", None)
    os.environ["PREFECT_PROFILE"] = "ephemeral"
    os.environ["PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"] = "true"
    return Server(None, f"a temporary server ({reason})", reason)


class TemporaryServer:
    """A Prefect server for one command, with the database in PREFECT_HOME.

    It starts while the command imports Prefect, and ends when this process ends. It has its own
    session, so that signals to the command's process group (Ctrl-C, a service manager) do not reach
    it: the command still has to report the final states of its runs.
    """

    def __init__(self) -> None:
        """Start it and set PREFECT_API_URL. Call in the main thread, before Prefect is imported."""
        global temporary
        temporary = self
        [port] = free_ports(1)
        self.url = f"http://127.0.0.1:{port}/api"
        self.log = private_folder("prefect") / "server.log"
        os.environ[api_server.LOGIN] = login = api_server.new_login()
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                api_server.command("127.0.0.1", port),
                env={**os.environ, **TEMPORARY, **api_server.environment(login, port)},
                start_new_session=True,
                preexec_fn=partial(die_with_parent, signal.SIGTERM),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        atexit.register(self.stop)
        os.environ["PREFECT_API_URL"] = self.url

    def wait(self) -> None:
        """Wait until the server answers.

        Raises:
            ConfigError: it has exited, or does not answer.
        """
        end = time.monotonic() + START_SECONDS
        while (problem := unreachable(self.url, 5.0)) is not None:
            code = self._process.poll()
            if code is not None or time.monotonic() > end:
                what = problem if code is None else f"it exited with code {code}"
                raise ConfigError(
                    f"The temporary Prefect server did not start: {what}.\nIts log: {self.log}"
                )
            time.sleep(0.05)

    def stop(self) -> None:
        """Stop the server. Its database keeps the runs."""
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def unreachable(url: str, timeout: float) -> str | None:
    """Why no Prefect server answers at a URL; None if one does."""
    try:
        healthy = _get(f"{url}/health", timeout)
    except OSError as error:
        return _reason(error)
    except ValueError as error:
        return str(error) or type(error).__name__
    return None if healthy is True else "something else than a Prefect server answers there"


def closed(url: str, timeout: float) -> str | None:
    """Why a server that answers lets this process not in; None if it does."""
    login = os.environ.get(api_server.LOGIN, "")
    if not login and "PREFECT_API_KEY" in os.environ:
        return None
    sent = {"Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"} if login else {}
    try:
        _get(f"{url}/version", timeout, sent)
    except urllib.error.HTTPError as error:
        if error.code == 401:
            what = "is wrong" if login else "is not set"
            return (
                f"it asks for a login, and {api_server.LOGIN} {what}. `rlhf up` prints the file "
                "that holds it"
            )
    except (OSError, ValueError):
        pass  # whatever it is, the client will say it better
    return None


def _at_its_api(url: str) -> str:
    """A hint, if the address is that of a server's pages."""
    api = f"{url.rstrip('/')}/api"
    if unreachable(api, 2.0) is not None:
        return ""
    return f". A Prefect server answers at {api}: set PREFECT_API_URL to that"


def _get(url: str, timeout: float, headers: Mapping[str, str] = MappingProxyType({})) -> Any:
    request = urllib.request.Request(url, headers=dict(headers))
    with urllib.request.urlopen(request, timeout=timeout) as reply:
        text, kind = reply.read(1000), reply.headers.get_content_type()
    try:
        return json.loads(text)
    except ValueError:
        raise ValueError(f"the answer is no JSON but {kind}") from None


def _reason(error: OSError) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP status {error.code}"
    if isinstance(error, urllib.error.URLError):
        return str(getattr(error.reason, "strerror", None) or error.reason)
    return str(error) or type(error).__name__


def _configured() -> tuple[str | None, str]:
    """The URL that the user has configured, and where: environment, profile or nowhere."""
    if url := os.environ.get("PREFECT_API_URL"):
        return url, "environment"
    home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    try:
        profiles = tomllib.loads((home / "profiles.toml").read_text())
        name = os.environ.get("PREFECT_PROFILE", profiles.get("active"))
        url = profiles["profiles"][name]["PREFECT_API_URL"]
    except (OSError, ValueError, KeyError, TypeError):
        return None, "nowhere"
    return str(url), "profile"
