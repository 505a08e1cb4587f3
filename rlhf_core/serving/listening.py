"""The address that a server answers at, taken before a model is loaded, which takes a while."""

from __future__ import annotations

import socket

from rlhf_core.errors import ConfigError

LAST_REPLIES = 5  # seconds for running replies once the server is to end


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ConfigError: the port is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"Port {port} of {host} cannot be used ({error.strerror or error}); choose another "
            "with --port."
        ) from error


def url_of(listener: socket.socket, host: str) -> str:
    """What clients open."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"
