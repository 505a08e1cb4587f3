"""Which Prefect server a command uses; decided, and put into the environment, before Prefect is
imported. Without a running server Prefect starts a temporary one in a child process."""

from __future__ import annotations

import json
import os
import tomllib
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from rlhf_core.store import rlhf_home

DEFAULT_URL = "http://127.0.0.1:4200/api"

QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
}


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
