"""The server's listening socket, opened before the model is loaded, so that errors come early."""

from __future__ import annotations

import socket

from rlhf_core.errors import ConfigError

SHUTDOWN_SECONDS = 5  # that running replies get when the server shuts down


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: the port is in use, or the address is not one of this machine.
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
    """The server's URL for clients."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"
