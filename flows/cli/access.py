"""Access to the pages and APIs that commands serve: from this machine only, or with a password.

A password comes from the environment or a prompt, never from an argument: the process list shows
arguments to every user of the machine.
"""

from __future__ import annotations

import os
import sys

import typer

from rlhf_core.errors import ConfigError
from rlhf_core.system.local import is_local
from rlhf_core.system.secrets import MIN_LENGTH


def password_for(host: str, variable: str, what: str) -> str | None:
    """The password that protects a server; None on a loopback address without one.

    Args:
        variable: environment variable that may have the password.
        what: is protected, for the prompt.

    Raises:
        ConfigError: other machines have access and there is no password, or it is too short.
    """
    password = os.environ.get(variable)
    if not password and is_local(host):
        return None
    if not password:
        if not sys.stdin.isatty():
            raise ConfigError(
                f"--host {host} gives other machines access, and there is no password: set "
                f"{variable}, or start the command in a terminal, which prompts for it."
            )
        password = str(typer.prompt(f"Password for {what}", hide_input=True))
    if len(password) < MIN_LENGTH:
        raise ConfigError(
            f"The password for {what} has {len(password)} characters; expected at least "
            f"{MIN_LENGTH}."
        )
    return password
