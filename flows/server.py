"""Which Prefect server a command uses; decided, and put into the environment, before Prefect is
imported. Where none runs, a temporary one is started in a child process."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from rlhf_core.errors import ConfigError
from rlhf_core.store import rlhf_home
from rlhf_core.system.ports import free_ports
from rlhf_core.system.processes import die_with_parent

DEFAULT_URL = "http://127.0.0.1:4200/api"

QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
}
# Prefect's own words for a server that ends with its client, and has no pages.
TEMPORARY = {
    "PREFECT_SERVER_UI_ENABLED": "0",
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
}
START_SECONDS = 180.0
temporary: TemporaryServer | None = None  # this process's


@dataclass(frozen=True)
class Server:
    """The server that is used.

    Attributes:
        url: of its API, None for a temporary one.
        text: for people; says why it is this one.
    """

    url: str | None
    text: str


def choose_server() -> Server:
    """Set the environment for Prefect, and say which server it will find."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    url, origin = _configured()
    if "PREFECT_HOME" not in os.environ and origin != "profile":
        home = rlhf_home() / "prefect"
        home.mkdir(parents=True, exist_ok=True)  # Prefect itself makes no parents
        os.environ["PREFECT_HOME"] = str(home)
    if url is not None:
        problem = unreachable(url, 5.0)
        if problem is None:
            return Server(url, url)
        where = "PREFECT_API_URL" if origin == "environment" else "The Prefect profile"
        reason = f"{where} names {url}, which does not answer: {problem}"
    elif unreachable(DEFAULT_URL, 1.0) is None:
        os.environ["PREFECT_API_URL"] = DEFAULT_URL
        return Server(DEFAULT_URL, f"{DEFAULT_URL} (found running)")
    else:
        reason = "PREFECT_API_URL is not set"
    os.environ.pop("PREFECT_API_URL", None)
    os.environ["PREFECT_PROFILE"] = "ephemeral"
    os.environ["PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"] = "true"
    return Server(None, f"a temporary server ({reason})")


class TemporaryServer:
    """A Prefect server for one command, on the database in PREFECT_HOME.

    It starts while the command imports Prefect, and ends with this process, however that ends.
    Signals to the command's process group, as Ctrl-C or a service manager send them, do not reach
    it: the command has to report to it what has become of its runs.
    """

    def __init__(self) -> None:
        """Start it, and set PREFECT_API_URL. Call it in the main thread, before Prefect is
        imported."""
        global temporary
        temporary = self
        [port] = free_ports(1)
        self.url = f"http://127.0.0.1:{port}/api"
        self.log = rlhf_home() / "prefect-server.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        found = find_spec("prefect")
        assert found is not None and found.origin is not None
        place = str(Path(found.origin).parents[1])  # and not the folder that the user is in
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "uvicorn", "--app-dir", place, "--factory",
                 "prefect.server.api.server:create_app", "--host", "127.0.0.1",
                 "--port", str(port), "--log-level", "error", "--lifespan", "on"],
                env={**os.environ, **TEMPORARY}, start_new_session=True,
                preexec_fn=partial(die_with_parent, signal.SIGTERM),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        atexit.register(self.stop)
        os.environ["PREFECT_API_URL"] = self.url

    def wait(self) -> None:
        """Until it answers.

        Raises:
            ConfigError: it has ended, or does not answer.
        """
        end = time.monotonic() + START_SECONDS
        while (problem := unreachable(self.url, 5.0)) is not None:
            code = self._process.poll()
            if code is not None or time.monotonic() > end:
                what = problem if code is None else f"it ended with exit code {code}"
                raise ConfigError(
                    f"The temporary Prefect server did not start: {what}.\nIts log: {self.log}"
                )
            time.sleep(0.05)

    def stop(self) -> None:
        """End it; what it was told is in its database."""
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def unreachable(url: str, timeout: float) -> str | None:
    """Why no Prefect server answers there; None when one does."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=timeout) as reply:
            healthy = json.loads(reply.read(1000))
    except urllib.error.HTTPError as error:
        return f"HTTP status {error.code}"
    except urllib.error.URLError as error:
        return str(getattr(error.reason, "strerror", None) or error.reason)
    except (OSError, ValueError) as error:
        return str(error) or type(error).__name__
    return None if healthy is True else "what answers there is not a Prefect server"


def _configured() -> tuple[str | None, str]:
    """The URL that the user has set, and where."""
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
