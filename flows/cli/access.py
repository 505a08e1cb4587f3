"""Who may reach a page or an API that a command opens: this machine, or whoever knows a password.

A password comes from the environment or the keyboard, never as an argument: the list of processes
shows arguments to everyone on the machine.
"""

from __future__ import annotations

import ipaddress
import os
import sys

import typer

from rlhf_core.errors import ConfigError
from rlhf_core.system.secrets import MIN_LENGTH


def is_local(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def password_for(host: str, variable: str, what: str) -> str | None:
    """The password to ask for; None: only this machine can come, and nobody set one.

    Args:
        variable: environment variable that may hold it.
        what: is protected, for the prompt.

    Raises:
        ConfigError: others can come and there is no password, or it is too short.
    """
    password = os.environ.get(variable)
    if not password and is_local(host):
        return None
    if not password:
        if not sys.stdin.isatty():
            raise ConfigError(
                f"--host {host} lets other machines in, and there is no password: set {variable}, "
                "or start the command at a terminal, where it is asked for."
            )
        password = str(typer.prompt(f"Password for {what}", hide_input=True))
    if len(password) < MIN_LENGTH:
        raise ConfigError(
            f"The password for {what} has {len(password)} characters; needed are at least "
            f"{MIN_LENGTH}."
        )
    return password
