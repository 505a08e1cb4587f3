"""The Prefect server that this project starts, open only to who knows its password.

Prefect's default is a server for everybody: its API answers any caller, pages of other origins
included (`access-control-allow-origin: *`), under any name in the Host header. So any page that a
user of the machine visits could start runs and read logs. Here, also on 127.0.0.1,

- the API asks for a login, Prefect's basic authentication. Only the health checks answer without;
- no other origin may read an answer;
- the Host header names this machine. A page whose name was made to point to 127.0.0.1 (DNS
  rebinding) has the server's origin, but not its name.

On SQLite, writers take turns (`flows.turns`). Schemas are checked once (`flows.parameter_schemas`).

`python -m flows.api_server HOST PORT` runs it; settings and login come from the environment.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf_core.errors import ConfigError
from rlhf_core.system.local import allowed_hosts
from rlhf_core.system.private import write_private
from rlhf_core.system.processes import python_path
from rlhf_core.system.secrets import MIN_LENGTH

LOGIN = "PREFECT_API_AUTH_STRING"
"""Environment variable in which Prefect's clients find the login."""


def new_login() -> str:
    """USER:PASSWORD, as Prefect wants it."""
    return f"rlhf:{secrets.token_urlsafe(24)}"


def kept_login(path: Path) -> str:
    """The login in a file, made on first use, readable by this user only. Users may put their own.

    Raises:
        ConfigError: the file holds no login.
    """
    if not path.exists():
        write_private(path, f"{new_login()}\n")
    login = path.read_text().strip()
    if ":" not in login or len(login) < MIN_LENGTH or not login.isprintable():
        raise ConfigError(
            f"{path} holds no login: expected one line USER:PASSWORD of at least {MIN_LENGTH} "
            "characters. Delete the file to get a new one."
        )
    return login


def environment(login: str, port: int) -> dict[str, str]:
    """Environment variables of the server with this login. Clients need `LOGIN` alone."""
    return {
        "PREFECT_SERVER_API_AUTH_STRING": login,
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://127.0.0.1:{port}",
        "PREFECT_SERVER_UI_API_URL": "/api",  # of wherever the pages were opened
        "PYTHONPATH": python_path(),
    }


def command(host: str, port: int) -> list[str]:
    """The command line. -P: modules of the working folder do not count."""
    return [sys.executable, "-P", "-m", "flows.api_server", host, str(port)]


def main(arguments: Sequence[str]) -> None:
    """Serve until SIGTERM or SIGINT: one process with all services, as `prefect server start`."""
    import uvicorn
    from prefect.server.api.server import create_app
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from flows import parameter_schemas, turns

    host, port = arguments
    parameter_schemas.check_each_once()
    prefect = turns.for_database(create_app(final=True))
    app = TrustedHostMiddleware(prefect, allowed_hosts(host), www_redirect=False)
    uvicorn.run(app, host=host, port=int(port), log_level="warning", lifespan="on")


if __name__ == "__main__":
    main(sys.argv[1:])
